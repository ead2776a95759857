"""Optional packages: whether they are installed, and how to install them."""

from importlib.util import find_spec

from spdfq.errors import SpdfqError


def require(what: str, packages: tuple[str, ...], extra: str) -> None:
    """Check that optional packages are installed.

    Raises:
        SpdfqError: one is missing; the message has the command that installs it.
    """
    if missing := [package for package in packages if not installed(package)]:
        raise SpdfqError(f"{what}: needs {', '.join(missing)}, which is not installed: pip install 'spdfq[{extra}]'")


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None

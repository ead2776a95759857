"""Tasks for processes of their own, which import them by name."""

import os
import signal


def squared(number, progress):
    """The square; 0 ends its own process, as the system does when memory runs out."""
    progress.stage(1, 1, "squaring", None, None)
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def negated(number, progress):
    """The negative, without a word on stages: all that its process sends is the result."""
    return -number


def cut_short(number, progress):
    """Half of a message; then its process ends."""
    os.write(progress.connection.fileno(), (100).to_bytes(4, "big") + b"half")
    os._exit(3)


class EndsItsProcess:
    """Work whose process ends while it reads what to do, as one that cannot import it does."""

    def __reduce__(self):
        return os._exit, (7,)


def lost(number, why):
    return f"{number}: {why}"

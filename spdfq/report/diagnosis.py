"""The diagnosis of a run, as the page and the command line show it."""

from typing import Any

DIAGNOSIS_FILE, FRAGMENT_FILE = "diagnosis.json", "suggestion.toml"
COLUMNS = (
    "site",
    "bits",
    "in float",
    "±",
    "alone",
    "top-1 in float",
    "top-1 alone",
    "clipped",
    "levels",
    "SNR",
    "best SNR",
)
TOP = 10
BLOCKS = ("block", "before", "after", "held-out before", "held-out after", "")


def diagnosis_section(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a ``diagnosis.json``.

    Raises:
        KeyError: the file lacks a value.
    """
    return {
        "facts": facts(found),
        "columns": COLUMNS,
        "rows": site_rows(found),
        "blocks": BLOCKS,
        "block_rows": block_rows(found),
        "findings": [sentence(line) for line in found["findings"]],
        "notes": [sentence(line) for line in found["notes"]],
        "fragment": found["suggestion"]["fragment"].splitlines() if found["suggestion"] else [],
        "predicted": [sentence(line) for line in predicted(found)],
    }


def facts(found: dict[str, Any]) -> dict[str, str]:
    """The divergence on both kinds of images."""
    values = {"Divergence, calibration": f"{found['kl']:.4f}"}
    if found["heldout"]:
        values["Divergence, held-out"] = f"{found['heldout_kl']:.4f}"
    if found["top1"] is not None:
        values["Top-1, held-out"] = f"{found['full_top1']:.2f} → {found['top1']:.2f} %"
    return values | {"Images": f"{found['images']} calibration, {found['heldout']} held-out"}


def site_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each of the sites that cost most."""
    values = {each["site"]: each for each in found["values"]}
    return [_site_row(effect, values[effect["site"]]) for effect in found["effects"][:TOP]]


def _site_row(effect: dict[str, Any], values: dict[str, Any]) -> tuple[str, ...]:
    gain, alone = effect["top1_gain"], effect["top1_alone"]
    return (
        effect["site"],
        str(effect["bits"]),
        signed(-effect["gain"], 4),
        f"{effect['gain_error']:.4f}",
        f"{effect['alone']:.4f}",
        "" if gain is None else signed(gain, 2),
        "" if alone is None else f"{alone:.2f}",
        f"{values['clipped']:.2f} %",
        f"{values['used']} of {values['levels']}",
        f"{values['snr']:.1f}",
        f"{values['best_snr']:.1f}",
    )


def signed(value: float, digits: int) -> str:
    """A number with its sign; zero has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def block_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each block; the last column says where learning made it worse on held-out images."""
    rows = []
    for block in found["blocks"]:
        held = [block["heldout_before"], block["heldout_after"]]
        worse = None not in held and held[1] > held[0]
        shown = ["" if value is None else f"{value:.4f}" for value in (block["before"], block["after"], *held)]
        rows.append((block["block"], *shown, "worse" if worse else ""))
    return rows


def predicted(found: dict[str, Any]) -> list[str]:
    """Lines on what the suggestion promises and costs."""
    suggestion = found["suggestion"]
    if not suggestion:
        return ["more bits at the sites that cost most do not lower the divergence by 2 %"]
    weights, activations = suggestion["weight_bits"], suggestion["activation_bits"]
    line = f"predicted divergence on the calibration images: {found['kl']:.4f} → {suggestion['kl']:.4f}"
    if suggestion["heldout_kl"] is not None:
        line += f", on held-out images {found['heldout_kl']:.4f} → {suggestion['heldout_kl']:.4f}"
    if suggestion["top1"] is not None:
        line += f", top-1 {found['top1']:.2f} → {suggestion['top1']:.2f} %"
    return [
        line,
        f"cost: {weights[0]:.2f} → {weights[1]:.2f} bits for a weight on average, {activations[0]:.2f} → "
        f"{activations[1]:.2f} for an activation",
    ]


def sentence(line: str) -> str:
    """A line as a sentence."""
    return f"{line[0].upper()}{line[1:].removesuffix('.')}."

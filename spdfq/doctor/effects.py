"""What each quantized site costs: the divergence from the teacher with that site alone in float, or alone quantized."""

from attrs import evolve, frozen

from spdfq.doctor.pair import Images, Outcome, Pair
from spdfq.runtime import Runtime

TOP = 10


@frozen
class SiteEffect:
    """What one site costs.

    The cost is the mean of two tests: with all other sites quantized, and with all others in float.

    Args:
        site: its name.
        kind: as in ``sites.json``.
        bits: of its quantizer.
        cost: the mean of ``gain`` and ``alone``, by which sites are ordered.
        gain: how much the divergence from the teacher falls, on the calibration images, when this site alone is in
            float; negative where another error makes up for that of the site.
        gain_error: standard error of the gain over the images.
        alone: divergence from the teacher, on the calibration images, when this site alone is quantized.
        heldout_gain: as ``gain``, on the held-out images; ``None`` if it was not measured.
        heldout_alone: as ``alone``, on the held-out images.
        top1_gain: how much top-1 rises on the held-out images when this site alone is in float, in points.
        top1_alone: top-1 on the held-out images when this site alone is quantized, in percent.
    """

    site: str
    kind: str
    bits: int
    cost: float
    gain: float
    gain_error: float
    alone: float
    heldout_gain: float | None = None
    heldout_alone: float | None = None
    top1_gain: float | None = None
    top1_alone: float | None = None


def site_effects(
    pair: Pair, images: Images, now: Outcome, heldout: Images | None, heldout_now: Outcome | None, runtime: Runtime
) -> list[SiteEffect]:
    """The effect of each site, largest cost first. On the held-out images, only those of the first `TOP` are measured.

    Args:
        pair: the quantized model and its reference.
        images: calibration images, on which sites are ordered.
        now: of the quantized model on them.
        heldout: other images.
        heldout_now: of the quantized model on them.
        runtime: progress.
    """
    found = []
    with runtime.progress("testing each site", len(pair.sites)) as advance:
        for name in pair.sites:
            kind, bits = pair.model.sites[name].kind, pair.model.quantizers[name].bits
            gain, error = now.fall_to(pair.alone_in_float(name, images))
            alone = pair.alone_quantized(name, images).kl
            found.append(SiteEffect(name, kind, bits, (gain + alone) / 2, gain, error, alone))
            advance()
    found.sort(key=lambda effect: -effect.cost)
    if heldout is None or heldout_now is None:
        return found
    top = found[:TOP]
    with runtime.progress("testing the first sites on held-out images", len(top)) as advance:
        for index, effect in enumerate(top):
            found[index] = _on_heldout(pair, effect, heldout, heldout_now)
            advance()
    return found


def _on_heldout(pair: Pair, effect: SiteEffect, heldout: Images, now: Outcome) -> SiteEffect:
    floating, alone = pair.alone_in_float(effect.site, heldout), pair.alone_quantized(effect.site, heldout)
    measured = now.top1 is not None and floating.top1 is not None
    return evolve(
        effect,
        heldout_gain=now.fall_to(floating)[0],
        heldout_alone=alone.kl,
        top1_gain=floating.top1 - now.top1 if measured else None,  # type: ignore[operator]
        top1_alone=alone.top1,
    )

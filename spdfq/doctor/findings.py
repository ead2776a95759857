"""What stands out in a diagnosis, in sentences."""

from collections.abc import Sequence

from spdfq.doctor.block_errors import BlockError
from spdfq.doctor.effects import SiteEffect
from spdfq.doctor.pair import Outcome
from spdfq.doctor.site_values import SiteValues

BETTER_RANGE = 6.0
"""A range that halves the error at the same bits, in dB, is a finding."""
_SHOWN = 5
_SHARE = 0.1


def findings(
    effects: Sequence[SiteEffect], values: Sequence[SiteValues], blocks: Sequence[BlockError], now: Outcome
) -> list[str]:
    """A sentence for each thing that stands out, the most important first."""
    return [
        *_costly(effects, now),
        *_named("a range chosen again for the observed values would more than halve the error", _ranges(values)),
        *_named("channels are one value after quantization, but not before", _dead(values)),
        *_named("channels are constant in float, too", _constant(values)),
        *_named("channels have much larger values than the others", _outliers(values)),
        *_named("tokens have much larger values than the others", _tokens(values)),
        *_named("learning made blocks worse on held-out images", _worse(blocks)),
    ]


def _named(what: str, found: Sequence[str]) -> list[str]:
    """One sentence, with the first places where it is true."""
    if not found:
        return []
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what}: {'; '.join(found[:_SHOWN])}{more}"]


def _costly(effects: Sequence[SiteEffect], now: Outcome) -> list[str]:
    costly = [each for each in effects if each.gain > max(_SHARE * now.kl, 2 * each.gain_error)]
    found = [f"{each.site} ({100 * each.gain / now.kl:.0f} %)" for each in costly]
    return _named("single sites cost more than a tenth of the divergence, beyond two standard errors", found)


def _ranges(values: Sequence[SiteValues]) -> list[str]:
    bad = sorted(
        (each for each in values if each.best_snr - each.snr > BETTER_RANGE), key=lambda each: each.snr - each.best_snr
    )
    return [
        f"{each.site} ({each.snr:.1f} dB, at best {each.best_snr:.1f} dB; {each.clipped:.1f} % clipped, {each.used} of "
        f"{each.levels} levels used)"
        for each in bad
    ]


def _dead(values: Sequence[SiteValues]) -> list[str]:
    dead = sorted((each for each in values if each.dead), key=lambda each: -each.dead)
    return [f"{each.site} {each.dead} of {each.channels}" for each in dead]


def _constant(values: Sequence[SiteValues]) -> list[str]:
    return [f"{each.site} {each.constant} of {each.channels}" for each in values if each.constant]


def _outliers(values: Sequence[SiteValues]) -> list[str]:
    found = [(each.site, each.outlier_channels[0]) for each in values if each.outlier_channels]
    found.sort(key=lambda pair: -pair[1].ratio)
    return [f"{site} channel {outlier.index}, {outlier.ratio:.0f} times the median" for site, outlier in found]


def _tokens(values: Sequence[SiteValues]) -> list[str]:
    found = [(each.site, each.outlier_tokens[0]) for each in values if each.outlier_tokens]
    found.sort(key=lambda pair: -pair[1].ratio)
    return [f"{site} token {outlier.index}, {outlier.ratio:.0f} times the median" for site, outlier in found]


def _worse(blocks: Sequence[BlockError]) -> list[str]:
    return [f"{b.block} ({b.heldout_before:.4f} to {b.heldout_after:.4f})" for b in blocks if b.worse]

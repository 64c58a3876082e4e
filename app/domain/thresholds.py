"""Thresholds as error rates: what a score means, from a model's impostor curve.

FMR: the share of impostor pairs that would match 1:1. FPIR: how often a search of n strangers names anybody. Between the
measured points of a curve the logarithm of the rate is a straight line in the score; beyond them the first and the last
line go on, which for the upper end is the exponential tail (design notes: it predicts well from 200 people on).
"""

import math
from itertools import pairwise

from app.domain.faces import ModelCard, RatePoint

#: No curve measured on some hundred people says anything about rates below this.
SMALLEST_RATE = 1e-12
LOWEST_SCORE, HIGHEST_SCORE = -1.0, 1.0


def threshold_at_fmr(card: ModelCard, fmr: float) -> float:
    """The score that a share `fmr` of impostor pairs reaches, in [-1, 1]; a smaller rate never gives a lower one.

    fmr: in (0, 1); smaller than 1e-12 counts as that. Raises ValueError on another rate, or a card without a curve.
    """
    if not 0 < fmr < 1:
        message = f"an FMR lies between 0 and 1, not at {fmr}"
        raise ValueError(message)
    rate = math.log(max(fmr, SMALLEST_RATE))
    lower, upper = _segment_by_rate(_curve(card), rate)
    return _bounded(_between(rate, math.log(lower.fmr), math.log(upper.fmr), lower.threshold, upper.threshold))


def fmr_at(card: ModelCard, score: float) -> float:
    """The share of impostor pairs that reach this score, in [1e-12, 1]; a higher score never has a larger one.

    Raises ValueError on a card without a curve, or a score that is not a number.
    """
    if math.isnan(score):
        message = "a score is a number"
        raise ValueError(message)
    score = _bounded(score)
    lower, upper = _segment_by_score(_curve(card), score)
    rate = _between(score, lower.threshold, upper.threshold, math.log(lower.fmr), math.log(upper.fmr))
    return min(1.0, max(SMALLEST_RATE, math.exp(min(0.0, rate))))


def fmr_for_fpir(fpir: float, gallery_size: int) -> float:
    """The FMR at which a search of `gallery_size` strangers names anybody with probability `fpir`: 1-(1-FMR)^N = FPIR.

    fpir: in (0, 1). An empty gallery counts as one. Raises ValueError on another rate or a negative size.
    """
    if not 0 < fpir < 1:
        message = f"an FPIR lies between 0 and 1, not at {fpir}"
        raise ValueError(message)
    return -math.expm1(math.log1p(-fpir) / _at_least_one(gallery_size))


def threshold_at_fpir(card: ModelCard, fpir: float, gallery_size: int) -> float:
    """The score for a search of so many; a larger gallery never has a lower one."""
    return threshold_at_fmr(card, fmr_for_fpir(fpir, gallery_size))


def fpir_at(card: ModelCard, score: float, gallery_size: int) -> float:
    """How often a search of `gallery_size` strangers would reach this score, in [0, 1]."""
    fmr = fmr_at(card, score)
    if fmr >= 1:
        return 1.0
    return -math.expm1(_at_least_one(gallery_size) * math.log1p(-fmr))


def _curve(card: ModelCard) -> tuple[RatePoint, ...]:
    points = card.impostor_curve
    if len(points) < 2:  # noqa: PLR2004 - a line needs two
        message = f"the card of {card.pack} has no impostor curve"
        raise ValueError(message)
    if any(b.fmr >= a.fmr or b.threshold <= a.threshold for a, b in pairwise(points)) or points[-1].fmr <= 0:
        message = f"the impostor curve of {card.pack} does not fall"
        raise ValueError(message)
    return points


def _segment_by_rate(points: tuple[RatePoint, ...], log_rate: float) -> tuple[RatePoint, RatePoint]:
    return next((pair for pair in pairwise(points) if log_rate >= math.log(pair[1].fmr)), (points[-2], points[-1]))


def _segment_by_score(points: tuple[RatePoint, ...], score: float) -> tuple[RatePoint, RatePoint]:
    return next((pair for pair in pairwise(points) if score <= pair[1].threshold), (points[-2], points[-1]))


def _between(at: float, x0: float, x1: float, y0: float, y1: float) -> float:
    return y0 + (at - x0) * (y1 - y0) / (x1 - x0)


def _bounded(score: float) -> float:
    return min(HIGHEST_SCORE, max(LOWEST_SCORE, score))


def _at_least_one(gallery_size: int) -> int:
    if gallery_size < 0:
        message = f"a gallery cannot hold {gallery_size}"
        raise ValueError(message)
    return max(1, gallery_size)

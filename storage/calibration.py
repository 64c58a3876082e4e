"""How good an index is, measured on its own vectors: the smallest margin that misses no pair, and the proof of it.

Pairs are planted: a vector of the gallery, and a query turned away from it until their cosine lies just above the
threshold, where an index misses first. The real pairs, samples of one identity, are asked for too. A margin is chosen
on some pairs and proven on others; what is reported is what the others found.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import faiss
import numpy as np
import numpy.typing as npt

from storage.onebit import DEFAULT_MARGIN, Margin, OneBitIndex, can_compile
from storage.rows import read_rows
from storage.vectors import Halves, Ids, Vectors, cosines

#: What scans: FAISS, or the compiled kernels where they can be used.
Scanner = Literal["faiss", "compiled"]
#: Called with how many pairs are done, of how many in all.
Progress = Callable[[int, int], None]

#: How far above the threshold planted pairs lie at most: those further up are easier.
BAND: Final = 0.1
#: Real pairs asked for at most.
MOST_REAL_PAIRS: Final = 20_000
#: What a bound is said with, one-sided.
CONFIDENCE: Final = 0.95
#: Margins tried, in standard deviations. Of 40,000 planted pairs 17 were missed at 3.0, 2 at 3.5 and none at 4.0; of 6,485
#: live searches one missed somebody, right at the threshold. So with the spare one 5.0 is the least that is ever used.
SMALLEST_MARGIN, LARGEST_MARGIN, MARGIN_STEP = 4.5, 7.0, 0.25
#: Added to what the pairs at hand need: the gallery will see others, and the proof should seldom have to be repeated.
SPARE_MARGIN: Final = 0.5
#: Proofs that are tried, each with new pairs and a wider margin, before the truth is reported as it is.
MOST_PROOFS: Final = 5
#: Planted pairs, and as many real ones at most, that a margin is chosen on. A few do: what is chosen is proven on many.
_PAIRS_TO_CHOOSE_ON: Final = 1_000
#: Pairs that are planted, or ranked, at once.
_PAIRS_TOGETHER: Final = 1_000
#: Queries to a thread at a time.
_QUERIES_TOGETHER: Final = 100
#: Rows that make one small index: what the scan estimates of a pair depends on no other row. Beyond these the scan itself
#: begins to count.
_ROWS_ALONE: Final = 500
#: Lists are worth their overhead only when a query reads less than this share of the rows.
WORTHWHILE_SHARE: Final = 0.25
#: Galleries below this are scanned in a millisecond, and are not divided.
DIVIDED_ABOVE: Final = 100_000
#: Rows on which a probe curve is measured, and rows that teach k-means a list.
_CURVE_ROWS: Final = 50_000
_TRAINING_ROWS_PER_LIST: Final = 64


@dataclass(frozen=True, slots=True)
class Recall:
    """What one scanner missed of the pairs that an exact search finds.

    lower_bound: of the recall, with 95% confidence (Clopper and Pearson, one-sided).
    """

    pairs: int
    misses: int

    @property
    def lower_bound(self) -> float:
        """The recall under which so few misses would be seen in one of 20 measurements."""
        return 1 - _highest_rate(self.misses, self.pairs)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen for a gallery, and what it finds. recall: of each scanner, "faiss" and, where usable, "compiled"."""

    margin: Margin
    lists: int
    probes: int | None
    recall: dict[Scanner, Recall]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Queries (n, d) and the row of the gallery (n,) that each must find."""

    queries: Vectors
    rows: Ids

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)

    def __add__(self, other: "Pairs") -> "Pairs":
        """All of both."""
        return Pairs(np.concatenate([self.queries, other.queries]), np.concatenate([self.rows, other.rows]))

    def __getitem__(self, some: slice | Ids) -> "Pairs":
        """Some of them."""
        return Pairs(self.queries[some], self.rows[some])


@dataclass(frozen=True, slots=True)
class ProbeCurve:
    """How many of the lists, and which share of the rows, must be looked into to find a share of the pairs."""

    lists: int
    probes: dict[float, int]
    shares: dict[float, float]


def calibrate(
    folder: Path,
    dimension: int,
    *,
    people: Ids,
    threshold: float,
    target: float = 0.9995,
    pairs: int = 6_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """The smallest margin at which the built index in `folder` (see OneBitIndex.build) finds every pair.

    people: a number for each row (n,), the same for samples of one identity. target: what the lower bound of the recall must
    reach; more pairs are planted where `pairs` cannot show it. The scanner that will be used is proven through the whole
    index, the other one through the same code over the pairs' own rows. A large gallery that is worth dividing into lists
    has its codes written anew; not where the compiled scan can be used, which reads all sooner than FAISS reads a quarter.
    Raises what OneBitIndex.open raises.
    """
    ids, vectors = read_rows(folder, dimension)
    random = np.random.default_rng(seed)
    count = max(pairs, pairs_to_show(target))
    real = real_pairs(vectors, people, threshold, random)
    choosing = planted_pairs(vectors, threshold, _PAIRS_TO_CHOOSE_ON, random) + real[::2][:_PAIRS_TO_CHOOSE_ON]
    lists, probes = 1, None
    if len(ids) >= DIVIDED_ABOVE and not can_compile():
        share = (1 + target) / 2  # of the pairs: half of what may be missed is left to the proof's chance
        ranked = planted_pairs(vectors, threshold, count, random) + real[::2]
        curve = probe_curve(vectors, ranked, lists=round(math.sqrt(len(ids))), at=(share,), seed=seed)
        if curve.shares[share] < WORTHWHILE_SHARE:
            lists, probes = curve.lists, curve.probes[share]
            OneBitIndex.build(folder, lists=lists)
    scanners: tuple[Scanner, ...] = ("faiss", "compiled") if can_compile() and lists == 1 else ("faiss",)
    margin, recall = DEFAULT_MARGIN, dict[Scanner, Recall]()
    for scanner in scanners:
        chosen = _smallest(scanner, vectors, choosing, threshold) + SPARE_MARGIN
        for proof in range(MOST_PROOFS):
            margin = replace(margin, **{scanner: chosen})
            fresh = planted_pairs(vectors, threshold, count, random) + real[1::2]
            if scanner == scanners[-1]:
                with_all = OneBitIndex.open(
                    folder, dimension, margin=margin, probes=probes, compiled=scanner == "compiled"
                )
                misses = _misses(with_all, ids, fresh, threshold, progress)
            else:
                misses = len(_missed_alone(scanner, chosen, vectors, fresh, threshold))
            recall[scanner] = Recall(len(fresh), misses)
            is_proven = not misses if probes is None else recall[scanner].lower_bound >= target
            if is_proven or chosen >= LARGEST_MARGIN:
                break
            chosen = min(LARGEST_MARGIN, chosen + (1 + proof) * MARGIN_STEP)
            probes = None if probes is None else min(lists, 2 * probes)
    return Calibration(margin, lists, probes, recall)


def planted_pairs(vectors: Halves, threshold: float, count: int, random: np.random.Generator) -> Pairs:
    """`count` rows, each with a query whose cosine with it lies in [threshold, threshold + BAND].

    The query is the row, turned in a random direction.
    """
    rows = np.sort(random.integers(len(vectors), size=count))
    queries = np.empty((count, vectors.shape[1]), np.float32)
    for start in range(0, count, _PAIRS_TOGETHER):
        some = rows[start : start + _PAIRS_TOGETHER]
        held = vectors[some].astype(np.float64)
        lengths = np.linalg.norm(held, axis=1, keepdims=True)
        towards = held / lengths
        aside = random.normal(size=held.shape)
        aside -= np.sum(aside * towards, axis=1, keepdims=True) * towards
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        # A score is a product with the row as held, whose length is not quite 1.
        scores = threshold + random.uniform(1e-6, BAND, size=(len(some), 1))
        along = np.clip(scores / lengths, -1, 1)
        queries[start : start + _PAIRS_TOGETHER] = along * towards + np.sqrt(1 - along * along) * aside
    return Pairs(queries, rows)


def real_pairs(vectors: Halves, people: Ids, threshold: float, random: np.random.Generator) -> Pairs:
    """Pairs of samples of one identity that reach the threshold, at most MOST_REAL_PAIRS, in random order."""
    order = np.argsort(people, kind="stable")
    first, second = [], []
    step = found = 0
    # Samples of one identity are neighbours in this order: one step apart, then two, until no two are so far apart.
    while found < 2 * MOST_REAL_PAIRS:
        step += 1
        same = np.flatnonzero(people[order[:-step]] == people[order[step:]])
        if not len(same):
            break
        found += len(same)
        first.append(order[same])
        second.append(order[same + step])
    if not first:
        return Pairs(np.empty((0, vectors.shape[1]), np.float32), np.empty(0, np.int64))
    left, right = np.concatenate(first), np.concatenate(second)
    some = random.permutation(len(left))[:MOST_REAL_PAIRS]
    left, right = left[some], right[some]
    queries = vectors[left].astype(np.float32)
    scores = [cosines(vectors[row : row + 1], query)[0] for query, row in zip(queries, right.tolist(), strict=True)]
    reaches = np.array(scores) >= np.float32(threshold)
    return Pairs(queries[reaches], right[reaches])


def probe_curve(
    vectors: Halves, pairs: Pairs, *, lists: int, at: tuple[float, ...] = (0.95, 0.99, 0.999), seed: int = 0
) -> ProbeCurve:
    """What a division into `lists` would have to look into to find these shares of the pairs.

    Measured on up to 50,000 rows, in seconds.
    """
    random = np.random.default_rng(seed)
    sample = np.sort(random.permutation(len(vectors))[: max(_CURVE_ROWS, lists)])
    kmeans = faiss.Kmeans(
        vectors.shape[1], lists, niter=10, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=_TRAINING_ROWS_PER_LIST,
    )  # fmt: skip
    rows = vectors[sample].astype(np.float32)
    kmeans.train(rows)
    centres = np.asarray(kmeans.centroids)
    sizes = np.bincount(np.argmax(rows @ centres.T, axis=1), minlength=lists)
    ranks, shares = np.empty(len(pairs), np.int64), np.empty(len(pairs))
    for start in range(0, len(pairs), _PAIRS_TOGETHER):
        some = pairs[slice(start, start + _PAIRS_TOGETHER)]
        mine = np.argmax(vectors[some.rows].astype(np.float32) @ centres.T, axis=1)
        order = np.argsort(-(some.queries @ centres.T), axis=1)
        rank = np.argmax(order == mine[:, np.newaxis], axis=1)
        read = np.cumsum(sizes[order], axis=1)[np.arange(len(some)), rank]
        ranks[start : start + len(some)] = rank + 1
        shares[start : start + len(some)] = read / len(sample)
    return ProbeCurve(
        lists,
        {share: int(np.quantile(ranks, share, method="higher")) for share in at},
        {share: float(np.quantile(shares, share, method="higher")) for share in at},
    )


def pairs_to_show(target: float) -> int:
    """How many pairs, all found, show that a recall is at least `target`."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(target)) if 0 < target < 1 else 1


def _smallest(scanner: Scanner, vectors: Halves, pairs: Pairs, threshold: float) -> float:
    """The smallest margin that misses none of the pairs."""
    chosen, left = SMALLEST_MARGIN, pairs
    # What a wider margin misses, a smaller one missed too: only that is asked for again.
    while chosen < LARGEST_MARGIN and len(left):
        chosen += MARGIN_STEP
        left = _missed_alone(scanner, chosen - MARGIN_STEP, vectors, left, threshold)
    return chosen - MARGIN_STEP if not len(left) else chosen


def _missed_alone(scanner: Scanner, margin: float, vectors: Halves, pairs: Pairs, threshold: float) -> Pairs:
    """Those of the pairs that are missed, each searched among some of the other pairs' rows.

    In one thread: a scan of so few rows is over before Python has called it.
    """
    is_missed: list[bool] = []
    for some in _portions(pairs, _ROWS_ALONE):
        rows = np.unique(some.rows)
        index = OneBitIndex(vectors.shape[1], margin=Margin(margin, margin), compiled=scanner == "compiled")
        index.add(rows, vectors[rows])
        is_missed += _are_missed(index, some.rows, some, threshold)
    return pairs[np.flatnonzero(is_missed)]


def _misses(index: OneBitIndex, ids: Ids, pairs: Pairs, threshold: float, progress: Progress | None) -> int:
    """How many of the pairs the index misses, searched with all cores."""

    def missed(some: Pairs) -> list[bool]:
        return _are_missed(index, ids[some.rows], some, threshold)

    misses = done = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for answers in pool.map(missed, _portions(pairs, _QUERIES_TOGETHER)):
            misses += sum(answers)
            done += len(answers)
            if progress is not None:
                progress(done, len(pairs))
    return misses


def _are_missed(index: OneBitIndex, wanted: Ids, pairs: Pairs, threshold: float) -> list[bool]:
    found = index.range(pairs.queries, threshold)
    return [one not in hits.ids for one, hits in zip(wanted.tolist(), found, strict=True)]


def _portions(pairs: Pairs, size: int) -> Iterator[Pairs]:
    for start in range(0, len(pairs), size):
        yield pairs[slice(start, start + size)]


def _highest_rate(misses: int, pairs: int) -> float:
    """The rate of misses at which `misses` or fewer of so many pairs have a chance of 1 - CONFIDENCE."""
    if misses >= pairs:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if _chance_of_at_most(misses, pairs, rate) > 1 - CONFIDENCE:
            low = rate
        else:
            high = rate
    return high


def _chance_of_at_most(misses: int, pairs: int, rate: float) -> float:
    """The binomial distribution's lower tail."""
    counts = np.arange(misses + 1)
    ways: npt.NDArray[np.float64] = np.array(
        [math.lgamma(pairs + 1) - math.lgamma(one + 1) - math.lgamma(pairs - one + 1) for one in counts.tolist()]
    )
    return float(np.exp(ways + counts * math.log(rate) + (pairs - counts) * math.log1p(-rate)).sum())

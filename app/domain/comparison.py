"""How alike two faces are."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import numpy.typing as npt

from app.domain.faces import Embedding


def similarity(probe: Embedding, references: Embedding) -> npt.NDArray[np.float32]:
    """Cosine similarity of one probe to each reference.

    probe: (d,), references: (n, d); float32, unit length. Returns (n,), in [-1, 1].
    Raises ValueError when the dimensions differ.
    """
    if probe.ndim != 1 or references.ndim != 2 or references.shape[1] != probe.shape[0]:  # noqa: PLR2004 - (n, d)
        message = f"a probe of {probe.shape} cannot be compared with references of {references.shape}"
        raise ValueError(message)
    scores: npt.NDArray[np.float32] = np.clip(references @ probe, -1.0, 1.0)
    return scores


def best_similarity(probe: Embedding, references: Embedding) -> float:
    """The best of the probe's similarities to (n, d) references; -1 without any."""
    return max(scores_with(probe, references), default=-1.0)


def scores_with(probe: Embedding, references: Embedding) -> list[float]:
    """The probe's similarity to each of (n, d) references; an empty list without references."""
    return [float(score) for score in similarity(probe, references)] if len(references) else []


def anchored(best: float, anchors: Iterable[float], floor: float) -> float:
    """The score that counts: `best` if the probe reaches the floor with every anchor; else at most the weakest anchor's.

    best: over all samples. anchors: the scores of the samples that the identity was enrolled by. Without anchors: -1.
    """
    weakest = min(anchors, default=-1.0)
    return best if weakest >= floor else min(best, weakest)


def show_one_person(embeddings: list[Embedding], threshold: float) -> bool:
    """Whether every two of the embeddings reach the threshold."""
    return all(float(one @ other) >= threshold for one, other in combinations(embeddings, 2))

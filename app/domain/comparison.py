"""How alike two faces are."""

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
    return float(similarity(probe, references).max()) if len(references) else -1.0


def show_one_person(embeddings: list[Embedding], threshold: float) -> bool:
    """Whether every two of the embeddings reach the threshold."""
    return all(float(one @ other) >= threshold for one, other in combinations(embeddings, 2))

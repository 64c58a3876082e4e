"""A graphics card that is lost, or out of memory, in the middle of its work."""

from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from app.engine.sessions import Floats, Session, _Running
from app.errors import ModelUnavailable
from storage.gpu import DeviceLost, GpuIndex
from storage.vectors import ExactIndex

DIMENSION = 8


class _Card:
    """A card that fails when it is told to, at the next call of that name."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexFlatIP(dimension)
        self.fails_at: str | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - FAISS's own
        return self._fail if name == self.fails_at else getattr(self._index, name)

    def _fail(self, *_: object) -> None:
        message = "CUDA error 2 out of memory"
        raise RuntimeError(message)


def _vectors(count: int) -> npt.NDArray[np.float16]:
    drawn = np.random.default_rng(5).standard_normal((count, DIMENSION))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("fails_at", ["search", "add", "reset"])
def test_h95_a_card_that_fails_answers_nothing_rather_than_too_little(fails_at: str) -> None:
    cards: list[_Card] = []

    def card(dimension: int) -> _Card:
        cards.append(_Card(dimension))
        return cards[-1]

    index = GpuIndex(DIMENSION, device=card)
    vectors = _vectors(3000)
    index.add(np.arange(3000), vectors)
    cards[0].fails_at = fails_at
    asked = vectors[:1].astype(np.float32)
    with pytest.raises(DeviceLost):
        if fails_at == "search":
            index.range(asked, 0.5)
        elif fails_at == "add":
            index.add(np.arange(3000, 3001), vectors[:1])
        else:
            index.remove(np.arange(2000))
    cards[0].fails_at = None
    with pytest.raises(DeviceLost):
        index.range(asked, 0.5)


def test_h95_the_index_that_is_opened_in_its_place_decides_the_same() -> None:
    vectors = _vectors(500)
    lost, anew = GpuIndex(DIMENSION, device=faiss.IndexFlatIP), ExactIndex(DIMENSION)
    for index in (lost, anew):
        index.add(np.arange(500), vectors)
    asked = vectors[:20].astype(np.float32)
    for one, other in zip(lost.range(asked, 0.6), anew.range(asked, 0.6), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scores.tolist() == other.scores.tolist()


def test_h95_a_model_that_fails_while_it_runs_is_unavailable_and_works_again_when_the_card_does() -> None:
    class _Session:
        is_lost = True

        def run(self, *_: object) -> list[Floats]:
            if self.is_lost:
                message = "CUDA failure 2: out of memory"
                raise ValueError(message)
            return [np.ones(1, np.float32)]

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    session = _Session()
    running = _Running(cast("Session", session), "det_10g.onnx")
    with pytest.raises(ModelUnavailable, match=r"det_10g\.onnx") as problem:
        running.run(None, {})
    assert "CUDA failure" not in str(problem.value)
    assert ModelUnavailable.status == 503
    session.is_lost = False
    assert running.run(None, {})[0].tolist() == [1.0]
    assert running.get_providers() == ["CUDAExecutionProvider"]

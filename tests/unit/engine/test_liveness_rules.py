"""Liveness where a gallery asks for it: never taken for granted, least of all where no model can tell."""

from dataclasses import dataclass

import pytest

from app.domain.faces import Face, Pixels
from app.domain.photo import PhotoReader
from app.domain.policy import GalleryPolicy
from app.engine.port import FaceEngine
from app.engine.reading import LIVE_FROM, Asked, read_face, why_not_live
from app.errors import NotLive
from app.use_cases.detect import assessment
from tests.builders import portrait
from tests.fakes import FakeEngine

READER = PhotoReader()


@dataclass
class Doubtful(FakeEngine):
    """An engine whose models say this of every face; None without models."""

    says: float | None

    def __post_init__(self) -> None:
        super().__init__()

    def liveness(self, pixels: Pixels, face: Face) -> float | None:
        del pixels, face
        return self.says


def policy(asked: Asked) -> GalleryPolicy:
    return GalleryPolicy(liveness=asked, quality="off")


@pytest.mark.parametrize("says", [None, 0.0, LIVE_FROM - 0.01])
def test_h25_where_a_live_face_is_required_doubt_is_a_refusal(says: float | None) -> None:
    engine: FaceEngine = Doubtful(says)
    with pytest.raises(NotLive) as refused:
        read_face(engine, portrait("ann"), policy("required"), READER)
    assert [advice.code for advice in refused.value.errors] == ["not-live"]
    found = assessment(engine, portrait("ann"), policy("required"), READER)
    assert [advice.code for advice in found.advice] == ["not-live"], "a look beforehand tells the same"


@pytest.mark.parametrize("says", [LIVE_FROM, 1.0])
def test_h25_where_a_live_face_is_required_a_live_one_is_taken(says: float) -> None:
    assert read_face(Doubtful(says), portrait("ann"), policy("required"), READER).liveness == says
    assert assessment(Doubtful(says), portrait("ann"), policy("required"), READER).advice == ()


def test_h25_where_liveness_is_observed_its_score_is_told_and_without_a_model_nothing_is() -> None:
    seen = assessment(Doubtful(0.2), portrait("ann"), policy("observe"), READER)
    assert seen.liveness is not None
    assert (seen.liveness.score, seen.liveness.passed) == (0.2, False)
    assert not read_face(Doubtful(0.2), portrait("ann"), policy("observe"), READER).is_live
    for asked in ("observe", "off"):
        assert assessment(Doubtful(None), portrait("ann"), policy(asked), READER).liveness is None
        assert read_face(Doubtful(None), portrait("ann"), policy(asked), READER).liveness is None


@pytest.mark.parametrize("asked", ["observe", "off"])
@pytest.mark.parametrize("says", [None, 0.0, 1.0])
def test_where_nobody_requires_it_nobody_is_refused_for_it(asked: Asked, says: float | None) -> None:
    assert why_not_live(says, asked) == ()

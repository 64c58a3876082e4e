"""Cosine similarity and what is made of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app.domain.comparison import anchored, best_similarity, show_one_person, similarity
from app.domain.faces import Embedding
from tests.fakes import embedding_of

D = 8


@st.composite
def units(draw: st.DrawFn) -> Embedding:
    raw = draw(arrays.arrays(np.float64, D, elements=st.floats(-1, 1)).filter(lambda v: np.linalg.norm(v) > 0.1))
    return (raw / np.linalg.norm(raw)).astype(np.float32)


galleries = st.lists(units(), max_size=6).map(lambda rows: np.array(rows, np.float32).reshape(-1, D))


@given(units(), galleries)
def test_similarities_are_cosines(probe: Embedding, references: Embedding) -> None:
    scores = similarity(probe, references)
    assert scores.shape == (len(references),)
    assert np.allclose(scores, references.astype(float) @ probe.astype(float), atol=1e-5)
    assert np.all(np.abs(scores) <= 1)


@given(units())
def test_a_face_is_wholly_like_itself_and_unlike_its_opposite(probe: Embedding) -> None:
    assert similarity(probe, np.array([probe, -probe])) == pytest.approx([1, -1], abs=1e-5)


@given(units(), units())
def test_similarity_does_not_depend_on_who_is_the_probe(one: Embedding, other: Embedding) -> None:
    assert best_similarity(one, other[None, :]) == pytest.approx(best_similarity(other, one[None, :]), abs=1e-6)


@given(units(), galleries, units())
def test_one_more_reference_never_lowers_the_best_score(probe: Embedding, some: Embedding, more: Embedding) -> None:
    assert best_similarity(probe, np.vstack([some, more[None, :]])) >= best_similarity(probe, some) - 1e-6


def test_without_references_nothing_is_alike() -> None:
    assert best_similarity(np.ones(D, np.float32), np.empty((0, D), np.float32)) == -1
    assert best_similarity(np.ones(D, np.float32), np.array([], np.float32)) == -1


@pytest.mark.parametrize("shape", [(2, D + 1), (D,), (1, 2, D)])
def test_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        similarity(np.ones(D, np.float32), np.ones(shape, np.float32))


@given(st.lists(units(), max_size=5), st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_never_joins_photos_that_a_lower_one_parts(
    photos: list[Embedding], one: float, other: float
) -> None:
    lower, higher = sorted((one, other))
    assert show_one_person(photos, lower) >= show_one_person(photos, higher)


def test_every_two_photos_must_be_alike() -> None:
    """A chain of look-alikes is not one person."""
    ann, both, bob = (embedding_of(people, 0) for people in (("ann",), ("ann", "bob"), ("bob",)))
    assert show_one_person([ann, both], 0.4)
    assert show_one_person([both, bob], 0.4)
    assert not show_one_person([ann, both, bob], 0.4)


def test_one_photo_shows_one_person() -> None:
    assert show_one_person([embedding_of(("ann",), 0)], 1.0)


cosines = st.floats(-1, 1)


@given(cosines, st.lists(cosines, min_size=1), cosines)
def test_a_score_counts_only_where_every_anchor_reaches_the_floor(
    best: float, anchors: list[float], floor: float
) -> None:
    counted = anchored(best, anchors, floor)
    assert counted <= best
    assert counted == best if min(anchors) >= floor else counted < floor or counted == best < floor


def test_without_anchors_nothing_counts() -> None:
    assert anchored(0.9, [], 0.2) == -1

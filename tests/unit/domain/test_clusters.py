"""Clusters against their definition: what hangs together, and what would fall apart."""

import time
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.clusters import DOUBTFUL_MARGIN, Cluster, Link, clusters

THRESHOLD = 0.4


@st.composite
def graphs(draw: st.DrawFn) -> list[Link]:
    """Links among a few people, none twice."""
    names = [f"id-{number}" for number in range(draw(st.integers(2, 8)))]
    chosen = draw(st.lists(st.sampled_from(list(combinations(names, 2))), unique=True, max_size=12))
    return [Link(low, high, draw(st.floats(THRESHOLD, 1))) for low, high in chosen]


def _components(links: list[Link]) -> set[frozenset[str]]:
    """By the book: groups are put together until no link leads out of one."""
    groups = {frozenset({name}) for link in links for name in link[:2]}
    for low, high, _ in links:
        touched = {group for group in groups if low in group or high in group}
        groups = (groups - touched) | {frozenset().union(*touched)}
    return groups


@given(graphs())
def test_clusters_are_the_connected_components(links: list[Link]) -> None:
    found = clusters(links, THRESHOLD)
    assert {frozenset(cluster.members) for cluster in found} == _components(links)
    assert sum(len(cluster.members) for cluster in found) == len({name for link in links for name in link[:2]})
    assert sum(cluster.links for cluster in found) == len(links)


@given(graphs())
def test_a_weak_link_is_a_doubtful_one_without_which_its_cluster_falls_apart(links: list[Link]) -> None:
    marked = {link for cluster in clusters(links, THRESHOLD) for link in cluster.weak}
    for link in links:
        without = [other for other in links if other != link]
        alone = {frozenset({name}) for name in link[:2]} - {
            frozenset({name}) for name in link[:2] if any(name in other[:2] for other in without)
        }
        falls_apart = len(_components(without) | alone) > len(_components(links))
        assert (link in marked) == (falls_apart and link.score < THRESHOLD + DOUBTFUL_MARGIN)


@given(graphs(), st.randoms())
def test_neither_the_order_of_the_links_nor_a_worse_score_of_the_same_pair_matters(
    links: list[Link], order: object
) -> None:
    shuffled = [*links, *(link._replace(score=link.score - 0.3) for link in links)]
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert clusters(shuffled, THRESHOLD) == clusters(links, THRESHOLD)


def test_two_groups_that_one_doubtful_likeness_put_together_are_told_apart_from_one_group() -> None:
    doubtful = Link("c", "d", THRESHOLD + 0.01)
    groups = [Link(*pair, 0.7) for trio in ("abc", "def") for pair in combinations(trio, 2)]
    assert clusters([*groups, doubtful], THRESHOLD) == [Cluster(tuple("abcdef"), 7, (doubtful,))]
    second = Link("b", "e", THRESHOLD + 0.01)
    assert clusters([*groups, doubtful, second], THRESHOLD)[0].weak == ()


def test_the_largest_cluster_comes_first() -> None:
    links = [Link("a", "b", 0.9), Link("x", "y", 0.9), Link("y", "z", 0.9)]
    assert [cluster.members for cluster in clusters(links, THRESHOLD)] == [("x", "y", "z"), ("a", "b")]


@pytest.mark.parametrize("shape", ["chain", "star", "pairs"])
def test_a_hundred_thousand_links_take_a_moment(shape: str) -> None:
    ends = {
        "chain": [(i, i + 1) for i in range(100_000)],
        "star": [(0, i + 1) for i in range(100_000)],
        "pairs": [(2 * i, 2 * i + 1) for i in range(100_000)],
    }[shape]
    links = [Link(f"{one:06}", f"{other:06}", 0.41) for one, other in ends]
    began = time.process_time()
    found = clusters(links, THRESHOLD)
    assert time.process_time() - began < 5
    assert sum(len(cluster.weak) for cluster in found) == 100_000

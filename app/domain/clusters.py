"""Clusters: who belongs together when everybody who looks alike is linked, and which links that hangs on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

#: A link this little over the threshold may be chance. Two strangers reach a score ten times more rarely for every 0.03 to
#: 0.07 that it is higher (the impostor curves of the models' cards), so nine of ten chance links lie within this of it.
DOUBTFUL_MARGIN: Final = 0.05


class Link(NamedTuple):
    """Two identities that look alike, and how much."""

    low: str
    high: str
    score: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Identities that hang together, by rising id; links: how many hold them; weak: those that should be looked at first.

    A weak link is a bridge (without it the cluster falls apart) whose score is within DOUBTFUL_MARGIN of the threshold: two
    groups, each perhaps one person, that a single doubtful likeness has put together. A doubtful link inside of a group is
    none: others say the same. Nor is a bridge far over the threshold: two photos of one person often are all there is.
    """

    members: tuple[str, ...]
    links: int
    weak: tuple[Link, ...]


def clusters(links: Iterable[Link], threshold: float) -> list[Cluster]:
    """The connected components of the links, largest first, equal ones by their first member.

    threshold: which the links reached. Of several links of one pair the best counts. Takes time in proportion to the links.
    """
    best: dict[tuple[str, str], Link] = {}
    for link in links:
        known = best.get((link.low, link.high))
        if known is None or known.score < link.score:
            best[link.low, link.high] = link
    edges = list(best.values())
    names = sorted({name for link in edges for name in (link.low, link.high)})
    places = {name: place for place, name in enumerate(names)}
    ends = [(places[link.low], places[link.high]) for link in edges]
    beside: list[list[tuple[int, int]]] = [[] for _ in names]
    for edge, (one, other) in enumerate(ends):
        beside[one].append((other, edge))
        beside[other].append((one, edge))
    roots, bridges = _explored(beside)
    members: dict[int, list[str]] = {}
    for place, root in enumerate(roots):
        members.setdefault(root, []).append(names[place])
    counts = dict.fromkeys(members, 0)
    for one, _ in ends:
        counts[roots[one]] += 1
    weak: dict[int, list[Link]] = {}
    for edge in sorted(bridges):
        if edges[edge].score < threshold + DOUBTFUL_MARGIN:
            weak.setdefault(roots[ends[edge][0]], []).append(edges[edge])
    found = [
        Cluster(tuple(own), counts[root], tuple(sorted(weak.get(root, [])))) for root, own in members.items()
    ]  # fmt: skip
    return sorted(found, key=lambda cluster: (-len(cluster.members), cluster.members))


def _explored(beside: list[list[tuple[int, int]]]) -> tuple[list[int], list[int]]:
    """Each node's root, the same for all of a component, and the edges that are bridges.

    beside: the neighbours of each node, each with the edge that leads there. Tarjan's bridges (1974): depth first, a node's
    `lowest` is the earliest node that it or anybody after it reaches by an edge that is not of the tree; where that is not
    before the node, the edge to it is a bridge. With a stack of its own: a chain of 100,000 is deeper than Python's.
    """
    unseen = -1
    order, lowest, roots = [unseen] * len(beside), [unseen] * len(beside), [unseen] * len(beside)
    bridges = []
    clock = 0
    for root in range(len(beside)):
        if order[root] != unseen:
            continue
        order[root] = lowest[root] = clock
        roots[root] = root
        clock += 1
        path = [(root, unseen, iter(beside[root]))]
        while path:
            node, came_by, rest = path[-1]
            for other, edge in rest:
                if edge == came_by:
                    continue
                if order[other] == unseen:
                    order[other] = lowest[other] = clock
                    roots[other] = root
                    clock += 1
                    path.append((other, edge, iter(beside[other])))
                    break
                lowest[node] = min(lowest[node], order[other])
            else:
                path.pop()
                if path:
                    before = path[-1][0]
                    lowest[before] = min(lowest[before], lowest[node])
                    if lowest[node] > order[before]:
                        bridges.append(came_by)
    return roots, bridges

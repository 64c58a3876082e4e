"""The Merkle tree of RFC 9162: the known answers of RFC 6962's test data, and laws against the RFC's own recursive words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.merkle import (
    EMPTY_ROOT,
    Growth,
    Node,
    consistency_path,
    fold,
    inclusion_path,
    leaf_hash,
    node_hash,
    proves_consistency,
    proves_inclusion,
    subtrees,
)

#: Inputs and roots of the test data that Certificate Transparency's implementations share.
INPUTS = [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]  # fmt: skip
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]

sizes = st.integers(0, 300)


def leaves_of(size: int) -> list[bytes]:
    return [leaf_hash(str(i).encode()) for i in range(size)]


def root_of(leaves: list[bytes]) -> bytes:
    """MTH, word for word (RFC 9162, 2.1.1)."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else EMPTY_ROOT
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return node_hash(root_of(leaves[:split]), root_of(leaves[split:]))


class Stored:
    """What growth leaves behind: leaves, and each complete subtree above them."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.growth = Growth()
        self.nodes: dict[Node, bytes] = {}
        self.roots = [EMPTY_ROOT]
        for place, leaf in enumerate(leaves):
            self.nodes[0, place] = leaf
            for node, hash_ in self.growth.add(leaf):
                assert node not in self.nodes, "each node is written once"
                self.nodes[node] = hash_
            self.roots.append(self.growth.root)

    def hashes(self, path: list[list[Node]]) -> list[bytes]:
        return [fold([self.nodes[node] for node in parts]) for parts in path]


LARGE = Stored(leaves_of(300))


def test_the_roots_are_those_of_the_known_test_data() -> None:
    stored = Stored(LEAVES)
    assert [root.hex() for root in stored.roots] == ROOTS


def test_proofs_are_those_of_the_known_test_data() -> None:
    stored = Stored(LEAVES)
    of_four = ROOTS[4]
    of_six_and_seven = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
    assert [hash_.hex() for hash_ in stored.hashes(inclusion_path(0, 8))] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [hash_.hex() for hash_ in stored.hashes(inclusion_path(5, 8))] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b", of_six_and_seven, of_four,
    ]  # fmt: skip
    assert [hash_.hex() for hash_ in stored.hashes(consistency_path(6, 8))] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a", of_six_and_seven, of_four,
    ]  # fmt: skip


@given(sizes)
def test_growth_gives_the_root_of_the_rfc(size: int) -> None:
    assert LARGE.roots[size] == root_of(leaves_of(size))


@given(st.data(), st.integers(1, 300))
def test_every_leaf_is_proved_in_every_tree_that_holds_it(data: st.DataObject, size: int) -> None:
    index = data.draw(st.integers(0, size - 1))
    path = LARGE.hashes(inclusion_path(index, size))
    assert len(path) <= (size - 1).bit_length()
    leaf, root = LARGE.nodes[0, index], LARGE.roots[size]
    assert proves_inclusion(leaf, index, size, path, root)
    other = data.draw(st.integers(0, size - 1).filter(lambda place: place != index)) if size > 1 else size
    assert not proves_inclusion(leaf, other, size, path, root)
    assert not proves_inclusion(leaf_hash(b"another"), index, size, path, root)
    assert not proves_inclusion(leaf, index, size, [*path, leaf], root)
    if path:
        assert not proves_inclusion(leaf, index, size, path[:-1], root)
        assert not proves_inclusion(leaf, index, size, path[1:], root)


@given(st.data(), sizes)
def test_every_tree_is_proved_to_be_the_beginning_of_every_later_one(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(0, new))
    path = LARGE.hashes(consistency_path(old, new))
    assert len(path) <= new.bit_length() + 1
    before, after = LARGE.roots[old], LARGE.roots[new]
    assert proves_consistency(old, new, before, after, path)
    changed = leaf_hash(b"another")
    assert not proves_consistency(old, new, changed, after, path)
    assert not proves_consistency(old, new, before, after, [*path, changed])
    if path:
        assert not proves_consistency(old, new, before, changed, path)
        assert not proves_consistency(old, new, before, after, path[:-1])
        assert not proves_consistency(old, new, before, after, [changed, *path[1:]])


@given(sizes, sizes)
def test_the_fewest_subtrees_cover_exactly_the_range(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    parts = list(subtrees(start, stop))
    covered = [leaf for level, place in parts for leaf in range(place << level, (place + 1) << level)]
    assert covered == list(range(start, stop))
    siblings = {(level, place) for level, place in parts if (level, place ^ 1) in parts}
    assert not siblings, "two that are halves of one would be that one"


@given(sizes, sizes)
def test_a_tree_grows_by_whole_subtrees_as_by_their_leaves(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    growth = Growth(start, [LARGE.nodes[node] for node in subtrees(0, start)])
    for node in subtrees(start, stop):
        growth.add(LARGE.nodes[node], node[0])
    assert (growth.size, growth.root) == (stop, LARGE.roots[stop])


def test_a_hundred_thousand_events_need_a_path_of_seventeen_hashes() -> None:
    lengths = {len(inclusion_path(index, 100_000)) for index in range(0, 100_000, 997)}
    assert max(lengths) == 17
    longest = max(len(parts) for parts in inclusion_path(99_999, 100_000) + consistency_path(65_537, 100_000))
    assert longest <= 17, "each hash is folded from at most one subtree of each size"


def test_what_there_is_not_is_refused() -> None:
    for index, size in [(-1, 3), (3, 3), (0, 0)]:
        with pytest.raises(ValueError, match="is not in a tree"):
            inclusion_path(index, size)
        assert not proves_inclusion(LEAVES[0], index, size, [], LEAVES[0])
    for old, new in [(-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="is not the beginning"):
            consistency_path(old, new)
        assert not proves_consistency(old, new, EMPTY_ROOT, EMPTY_ROOT, [])
    assert not proves_consistency(3, 5, LARGE.roots[3], LARGE.roots[5], [])
    with pytest.raises(ValueError, match="2 peaks"):
        Growth(3, [LEAVES[0]])
    with pytest.raises(ValueError, match="no subtree"):
        Growth(1, [LEAVES[0]]).add(LEAVES[1], 1)

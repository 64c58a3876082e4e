"""The Merkle tree of RFC 9162 (section 2.1): hashes of leaves and nodes, growth, and proofs from stored nodes.

A node is named by its level and its place in it: (0, i) is leaf i, (k, i) covers the leaves from i * 2**k up to (i + 1) * 2**k.
Only such complete subtrees are ever stored, and each is written once; whatever else a proof needs is folded from at most one of
each size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

Node = tuple[int, int]
#: SHA-256 of nothing: the root of a tree without leaves.
EMPTY_ROOT: Final = hashlib.sha256().digest()


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf; 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of a node over its two children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def subtrees(start: int, stop: int) -> Iterator[Node]:
    """The fewest complete subtrees that cover the leaves from `start` up to `stop`, from left to right."""
    while start < stop:
        # The largest that begins here (no multiple of a higher power of two does) and still fits.
        level = (stop - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        yield level, start >> level
        start += 1 << level


def fold(hashes: Sequence[bytes]) -> bytes:
    """The root over neighbouring subtrees, each larger than the next (as those of a tree from leaf 0 are)."""
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


class Growth:
    """A tree that leaves, or whole subtrees, are added to at its right end.

    size: leaves so far. peaks: hashes of its complete subtrees, the largest first; they are all that growth needs.
    """

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        """Raises ValueError when there is not one peak for each subtree of that size."""
        if len(peaks) != size.bit_count():
            message = f"a tree of {size} leaves has {size.bit_count()} peaks, not {len(peaks)}"
            raise ValueError(message)
        self.size = size
        self.peaks = list(peaks)

    @property
    def root(self) -> bytes:
        """The tree's root hash."""
        return fold(self.peaks)

    def add(self, hash_: bytes, level: int = 0) -> list[tuple[Node, bytes]]:
        """Add a leaf, or a complete subtree of 2**level leaves; returns the nodes above it that are complete by that.

        Raises ValueError where a subtree of that size cannot begin.
        """
        if self.size % (1 << level):
            message = f"no subtree of 2**{level} leaves begins at leaf {self.size}"
            raise ValueError(message)
        place = self.size >> level
        self.size += 1 << level
        completed = []
        while place & 1:
            hash_ = node_hash(self.peaks.pop(), hash_)
            level, place = level + 1, place >> 1
            completed.append(((level, place), hash_))
        self.peaks.append(hash_)
        return completed


def inclusion_path(index: int, size: int) -> list[list[Node]]:
    """What proves that leaf `index` is in the tree of `size` leaves: for each hash of the path the subtrees to fold it from.

    At most log2(size), rounded up, hashes. Raises ValueError unless 0 <= index < size.
    """
    if not 0 <= index < size:
        message = f"leaf {index} is not in a tree of {size}"
        raise ValueError(message)
    path: list[list[Node]] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            path.append(list(subtrees(middle, stop)))
            stop = middle
        else:
            path.append(list(subtrees(start, middle)))
            start = middle
    return path[::-1]


def consistency_path(old: int, new: int) -> list[list[Node]]:
    """What proves that the tree of `old` leaves is the beginning of the one of `new` leaves; as in `inclusion_path`.

    Empty where there is nothing to prove (`old` is 0 or `new`). Raises ValueError unless 0 <= old <= new.
    """
    if not 0 <= old <= new:
        message = f"a tree of {old} leaves is not the beginning of one of {new}"
        raise ValueError(message)
    if old in (0, new):
        return []
    path: list[list[Node]] = []
    start, stop, is_whole = 0, new, True
    while stop != old:
        middle = start + _split(stop - start)
        if old <= middle:
            path.append(list(subtrees(middle, stop)))
            stop = middle
        else:
            path.append(list(subtrees(start, middle)))
            start, is_whole = middle, False
    if not is_whole:  # the old root itself is known to whoever asks
        path.append(list(subtrees(start, stop)))
    return path[::-1]


def proves_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether the path shows that the leaf hash is the one at `index` in the tree with that root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for sibling in path:
        if not last:
            return False
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        place, last = place >> 1, last >> 1
    return not last and found == root


def proves_consistency(old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Whether the path shows that the tree with the new root begins with the one with the old root (RFC 9162, 2.1.4.2)."""
    if not 0 <= old <= new:
        return False
    if old in (0, new):
        return not path and old_root == (new_root if old else EMPTY_ROOT)
    hashes = [old_root, *path] if not old & (old - 1) else list(path)
    if not hashes:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    of_old = of_new = hashes[0]
    for sibling in hashes[1:]:
        if not last:
            return False
        if place & 1 or place == last:
            of_old, of_new = node_hash(sibling, of_old), node_hash(sibling, of_new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            of_new = node_hash(of_new, sibling)
        place, last = place >> 1, last >> 1
    return not last and of_old == old_root and of_new == new_root


def _split(size: int) -> int:
    """The largest power of two below `size` (at least 2): where RFC 9162 parts a tree."""
    return 1 << (size - 1).bit_length() - 1

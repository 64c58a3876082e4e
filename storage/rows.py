"""The two plain files of an index: ids and the vectors under them, row by row, so that both can be mapped."""

from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from storage.vectors import Halves, Ids

#: int64, rising, little-endian.
IDS_FILE: Final = "ids.i64"
#: float16 rows of d numbers, little-endian; row i lies under the i-th id.
VECTORS_FILE: Final = "vectors.f16"


def bytes_per_vector(dimension: int) -> int:
    """What a vector takes in a one-bit index: its float16 row, one bit a dimension with two factors, its id twice, a flag.

    Small galleries, and those on a graphics card, are held exactly, in twice as much: see VectorIndex.bytes.
    """
    return 2 * dimension + (dimension + 7) // 8 + 8 + 2 * 8 + 1


def read_rows(folder: Path, dimension: int) -> tuple[Ids, Halves]:
    """The files, mapped: ids (n,) and vectors (n, d). Raises OSError, or ValueError when they do not fit each other."""
    ids = _mapped(folder / IDS_FILE, "<i8")
    flat = _mapped(folder / VECTORS_FILE, "<f2")
    if flat.size != ids.size * dimension:
        message = f"{ids.size} ids and {flat.size} numbers are not vectors of {dimension}"
        raise ValueError(message)
    return ids, flat.reshape(ids.size, dimension)


class RowsWriter:
    """Writes both files in step."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.count = 0
        self._last = -1
        self._ids = (folder / IDS_FILE).open("wb")
        self._vectors = (folder / VECTORS_FILE).open("wb")

    def append(self, ids: Ids, vectors: Halves) -> None:
        """More rows, their ids above all before. Raises ValueError when they do not rise."""
        if not len(ids):
            return
        if ids[0] <= self._last or np.any(np.diff(ids) <= 0):
            message = "the ids of an index rise"
            raise ValueError(message)
        self._last = int(ids[-1])
        self._ids.write(ids.astype("<i8").tobytes())
        self._vectors.write(np.ascontiguousarray(vectors, dtype="<f2").tobytes())
        self.count += len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Raises OSError when the last rows find no room."""
        self._ids.close()
        self._vectors.close()


def _mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")

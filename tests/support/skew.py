"""Sets the wall clock of one process to any time while the process runs. The clocks of other processes stay as they are.

With a C compiler, a preloaded library (`skew.c`) moves the clock for the whole process. Without a compiler, only clocks that
Python code reads are moved: `time.time`, and `datetime.now` in arq. The product reads no others. In both cases, a file has the
offset.
"""

import ctypes
import mmap
import shutil
import struct
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_suffix(".c")
#: In a child's environment: the file whose offset it follows.
VARIABLE: Final = "SKEW_FILE"


class Skew:
    """The clock of one host, as a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0)

    def set(self, seconds: float) -> None:
        """Set the clock this far ahead of the true time; a negative value sets it behind."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.write(struct.pack("d", seconds))


def preloaded(folder: Path) -> dict[str, str]:
    """The environment variables that a process needs to `follow`; empty without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {}
    library = folder / "skew.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def follow(path: str) -> None:
    """Make this process use the clock of this file."""
    try:
        move = ctypes.CDLL(None).skew_follow
    except AttributeError:
        _move_pythons(path)
    else:
        assert move(path.encode()) == 0, path


def _move_pythons(path: str) -> None:
    import arq.connections
    import arq.utils
    import arq.worker

    with Path(path).open("rb") as file:
        seen = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real = time.time

    def moved() -> float:
        return real() + float(struct.unpack("d", seen[:])[0])

    class Moved(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(moved(), tz)  # type: ignore[arg-type]

    time.time = moved
    arq.utils.time = moved  # type: ignore[assignment]
    arq.worker.time = moved  # type: ignore[assignment]
    arq.worker.datetime = Moved  # type: ignore[misc]

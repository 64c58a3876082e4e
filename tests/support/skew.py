"""The wall clock of a process, set to any time while it runs; everybody else's stays as it is.

With a C compiler a preloaded library moves it for all of the process (`skew.c`). Without one, what Python's own code reads is
moved: `time.time`, and `datetime.now` as arq has it, which is all that the product reads. Either way the offset is a file.
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
        """Set the clock so far ahead of the true time; negative: behind."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.write(struct.pack("d", seconds))


def preloaded(folder: Path) -> dict[str, str]:
    """What the environment of a process needs so that it can `follow`; nothing where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {}
    library = folder / "skew.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def follow(path: str) -> None:
    """Have this process go by the clock of that file."""
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

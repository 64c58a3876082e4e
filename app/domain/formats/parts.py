"""What every file format is reduced to, and the reasons why a file is not one still picture."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Still:
    """One still picture: a file of its format that has nothing but the parts that make the pixels.

    size: width and height as stored, before `orientation` (1 to 8, the values of EXIF) is applied.
    """

    data: bytes
    size: tuple[int, int]
    orientation: int


class Damaged(Exception):
    """The bytes are not a whole picture of their format. size: width and height that the header claims, where it was read."""

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = size


class Animated(Exception):
    """The file has more than one frame."""


class Unsupported(Exception):
    """The file is of another kind or coding. The message is a sentence that says which."""


class TooCostly(Exception):
    """To decode the picture takes more memory or time than one picture may take."""

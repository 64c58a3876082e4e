"""What the settings say about photos is what the reader does."""

import pytest
from pydantic import ValidationError

from app.config import PHOTO_FORMATS, Settings
from app.domain.photo import FORMATS, PhotoReader
from app.engine.opening import open_reader


def test_every_format_that_can_be_read_is_read_by_default_and_may_be_named() -> None:
    assert PHOTO_FORMATS == FORMATS
    reader = open_reader(Settings(_env_file=None))
    assert reader.accepted == FORMATS
    bare = PhotoReader()
    limits = ("max_pixels", "max_jpeg_pixels", "max_side")
    assert [getattr(reader, name) for name in limits] == [getattr(bare, name) for name in limits]
    reader.close()


@pytest.mark.parametrize(
    ("written", "read"), [("jpeg", ("jpeg",)), ("avif, jpeg", ("jpeg", "avif")), ("png jpeg", ("jpeg", "png"))]
)
def test_formats_are_named_in_any_order(written: str, read: tuple[str, ...]) -> None:
    assert open_reader(Settings(_env_file=None, photo_formats=written)).accepted == read


@pytest.mark.parametrize("written", ["gif", "jpeg,tiff", ",", "JPEG"])
def test_a_format_that_cannot_be_read_stops_the_start(written: str) -> None:
    with pytest.raises(ValidationError, match="jpeg, png, webp, heic, avif, jpeg2000"):
        Settings(_env_file=None, photo_formats=written)

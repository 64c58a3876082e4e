"""A small face in a large photo is read again from pixels that are less reduced."""

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from app.domain.alignment import TEMPLATE
from app.domain.faces import Embedding, Face, Pixels
from app.domain.photo import PhotoReader, decode_stored, encode
from app.domain.policy import GalleryPolicy
from app.engine.close_up import close_up
from app.engine.port import Search
from app.engine.reading import read_face, subject_in
from tests.fakes import FakeEngine

READER = PhotoReader()
#: The engine below takes areas of this colour for faces.
RED = (250, 20, 20)


@dataclass
class RedSquares(FakeEngine):
    """Takes all red pixels for one face, and remembers the pixels that it embedded."""

    embedded: list[Pixels] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """The box around everything red."""
        del search
        rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 90))
        if not len(rows):
            return []
        left, top = float(columns.min()), float(rows.min())
        side = float(columns.max()) + 1 - left
        landmarks = (TEMPLATE / 112 * side + (left, top)).astype(np.float32)
        return [Face((left, top, side, side), landmarks, 0.9)]

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """Any embedding."""
        del face
        self.embedded.append(pixels)
        return np.eye(1, 256, dtype=np.float32)[0], 20.0


def scene(size: tuple[int, int], at: tuple[int, int], side: int, kind: str = "PNG") -> bytes:
    """A grey photo with a red square."""
    picture = Image.new("RGB", size, (128, 128, 128))
    picture.paste(RED, (*at, at[0] + side, at[1] + side))
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=95)
    return buffer.getvalue()


POLICY = GalleryPolicy(quality="off", liveness="off")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_f6_a_face_is_measured_alike_on_both_sides_of_a_reduction(kind: str) -> None:
    engine = RedSquares()
    sides = []
    for width in (3198, 3200, 3202):
        seen = subject_in(engine, scene((width, 2000), (1100, 800), 72, kind), POLICY, READER)
        sides.append(min(seen.main.face.box[2:]))
        assert min(seen.face.box[2:]) * seen.photo.reduction == pytest.approx(72, abs=2)
        assert seen.photo.reduction == 1
    assert sides == pytest.approx([72, 72, 72], abs=2)


@pytest.mark.parametrize("at", [(1100, 800), (60, 60), (3100, 1900)])
def test_a_small_face_is_compared_in_the_photos_own_pixels_wherever_it_is(at: tuple[int, int]) -> None:
    engine = RedSquares()
    seen = subject_in(engine, scene((3240, 2060), at, 60), POLICY, READER)
    assert seen.photo.reduction == 1
    assert max(seen.photo.pixels.shape[:2]) <= 5 * 60
    assert engine.embedded[-1] is seen.photo.pixels
    assert seen.main.face.box == pytest.approx((*at, 60, 60), abs=2)


@pytest.mark.parametrize(("at", "side"), [((1100, 800), 60), ((40, 70), 60), ((1100, 800), 400)])
def test_the_stored_box_lies_around_the_face_on_the_stored_photo(at: tuple[int, int], side: int) -> None:
    reading = read_face(RedSquares(), scene((3240, 2060), at, side), POLICY, READER)
    assert reading.main.report.box == pytest.approx((*at, side, side), abs=2)
    x, y, width, height = (round(value) for value in reading.stored_box)
    face = decode_stored(encode(reading.pixels))[y : y + height, x : x + width]
    assert face.size
    assert np.abs(np.median(face, axis=(0, 1)) - RED).max() < 5
    around = decode_stored(encode(reading.pixels))[y + height + 4, x + width // 2]
    assert np.abs(around.astype(int) - 128).max() < 20


def test_a_large_face_is_not_looked_at_again() -> None:
    data = scene((3240, 2060), (1100, 800), 400)
    seen = subject_in(RedSquares(), data, POLICY, READER)
    assert seen.photo.reduction == 2
    assert close_up(data, READER.decode(data), seen.main.face, READER) is None


def test_a_part_of_a_turned_photo_is_turned_with_it() -> None:
    noise = np.random.default_rng(5).integers(0, 255, (40, 30, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize((3240, 4320), Image.Resampling.NEAREST).save(data, "PNG")
    whole = READER.decode(data.getvalue())
    for quarters in range(4):
        turned = whole.turned(quarters)
        part = READER.decode_part(data.getvalue(), turned, (400, 600, 800, 400), 1)
        assert (part.width, part.height, part.reduction, part.quarters) == (800, 400, 1, quarters)
        assert np.array_equal(part.pixels[::2, ::2][:200, :400], turned.pixels[300:500, 200:600])

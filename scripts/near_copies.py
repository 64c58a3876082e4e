"""How often copies of a photo are known again, and other photos of the same person taken for copies.

    python scripts/near_copies.py FACES [--model buffalo_sc] [--model-dir DIR] [--step 13]

FACES holds a folder per person with photos of theirs. Every pair of one person's photos should not be flagged; of every
STEPth photo copies are made, which should be.
"""

import argparse
import io
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

from PIL import Image

from app.config import Settings
from app.domain.near_copies import Likeness, is_near_copy, likeness
from app.domain.photo import decode, encode
from app.domain.policy import GalleryPolicy
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import Problem

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MOST_PIXELS = 25_000_000


def seen(engine: FaceEngine, photo: bytes) -> Likeness | None:
    """The photo's likeness; None where no face can be used."""
    try:
        decoded = decode(photo, max_pixels=MOST_PIXELS)
        subject = subject_of(engine, decoded, GalleryPolicy())
    except Problem:
        return None
    return likeness(subject.photo.pixels, subject.face.landmarks, subject.vector[0])


def copies(photo: bytes) -> Iterator[tuple[str, bytes]]:
    """The photo once more, in several ways."""
    picture = Image.open(io.BytesIO(photo)).convert("RGB")
    width, height = picture.size
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    yield "as the service keeps it", encode(decode(photo, max_pixels=MOST_PIXELS).pixels)
    for quality in (95, 75, 50, 30):
        yield f"JPEG {quality}", coded(picture, "JPEG", quality)
    yield "WebP 80", coded(picture, "WEBP", 80)
    yield "one pixel cut", coded(picture.crop((1, 1, width, height)), "JPEG", 95)
    yield (
        "a twentieth cut on each side",
        coded(picture.crop((width // 20, height // 20, width - width // 20, height - height // 20)), "JPEG", 90),
    )
    yield "nine tenths the size", coded(picture.resize((width * 9 // 10, height * 9 // 10)), "JPEG", 90)
    yield "two degrees turned", coded(picture.rotate(2, Image.Resampling.BICUBIC), "JPEG", 90)
    yield "mirrored", coded(mirror, "JPEG", 95)
    yield "mirrored, JPEG 75", coded(mirror, "JPEG", 75)


def coded(picture: Image.Image, kind: str, quality: int) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def main() -> None:
    """Print both kinds of rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path)
    parser.add_argument("--model", default="auto")
    parser.add_argument("--model-dir", type=Path, default=Settings().model_dir)
    parser.add_argument("--step", type=int, default=13)
    asked = parser.parse_args()
    engine = open_engine(Settings(face_model=asked.model, model_dir=asked.model_dir), device="cpu").engine
    pairs = flagged = 0
    photos: list[tuple[bytes, Likeness]] = []
    for folder in sorted(path for path in asked.faces.iterdir() if path.is_dir()):
        data = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
        own = [(photo, look) for photo in data if (look := seen(engine, photo)) is not None]
        for (_, new), (_, known) in permutations(own, 2):
            pairs += 1
            flagged += is_near_copy(new, known)
        photos += own
    print(f"other photos of the same person: {flagged} of {pairs} ordered pairs flagged")
    caught: dict[str, list[bool]] = {}
    for photo, known in photos[:: asked.step]:
        for kind, copy in copies(photo):
            look = seen(engine, copy)
            if look is not None:
                caught.setdefault(kind, []).append(is_near_copy(look, known))
    for kind, answers in caught.items():
        print(f"{kind}: {sum(answers)} of {len(answers)} flagged")


if __name__ == "__main__":
    main()

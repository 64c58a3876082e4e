"""Photos that come with the dependencies, and ways to spoil them."""

import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from app.domain.faces import Pixels


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / path


ASTRONAUT = package_file("skimage", "data/astronaut.png")  # Eileen Collins, by NASA, public domain; 512 x 512
HANKS = package_file("insightface", "data/images/Tom_Hanks_54745.png")
GROUP = package_file("insightface", "data/images/t1.jpg")  # six people


def pixels_of(file: Path) -> Pixels:
    """The photo's RGB pixels."""
    with Image.open(file) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


def encoded(pixels: Pixels, kind: str = "JPEG", **options: object) -> bytes:
    """The pixels as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()

"""Stand-ins for what is too slow or too fickle for most tests. They live here only: no setting selects them."""

import hashlib

import numpy as np

from app.domain.alignment import CROP_SIDE, TEMPLATE
from app.domain.faces import Embedding, Face, ModelCard, Pixels, RatePoint
from app.engine.port import Search
from app.errors import LowQuality

#: Strangers' cosines spread by 1/16 at this dimension: the thresholds of CARD lie five spreads away, and captures of one
#: person at 0.8 six.
DIMENSION = 256
#: How alike two captures of one person are.
CAPTURE_COSINE = 0.8
#: Where the face lies on a fake photo of SIDE pixels.
SIDE, FACE_AT = 160, 24

CARD = ModelCard(
    pack="fake",
    kind="fake",
    dimension=DIMENSION,
    contract="sha256:fake",
    licence="none",
    commercial_use=True,
    impostor_curve=(RatePoint(0.1, 0.08), RatePoint(1e-3, 0.2), RatePoint(1e-6, 0.32)),
    source="made up",
)


def inscribed(text: str) -> Pixels:
    """A grey photo whose first pixels hold the text; it survives lossless encoding only."""
    data = text.encode()
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    flat = pixels.reshape(-1)
    flat[:2] = len(data) // 256, len(data) % 256
    flat[2 : 2 + len(data)] = np.frombuffer(data, np.uint8)
    return pixels


def inscription(pixels: Pixels) -> str:
    """The text that `inscribed` put there."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    length = int(flat[0]) * 256 + int(flat[1])
    try:
        return bytes(flat[2 : 2 + length]).decode()
    except UnicodeDecodeError:  # a turned copy shows other pixels there
        return ""


def embedding_of(people: tuple[str, ...], capture: int) -> Embedding:
    """The embedding of a capture: near the person's own direction; between the directions of several who look alike."""
    centre = _unit(np.sum([_direction(person) for person in people], axis=0))
    noise = _direction(f"{people}/{capture}")
    noise = _unit(noise - (noise @ centre) * centre)
    return _unit(np.sqrt(CAPTURE_COSINE) * centre + np.sqrt(1 - CAPTURE_COSINE) * noise).astype(np.float32)


class FakeEngine:
    """Reads from the pixels whose face is meant: photos of `tests.builders.portrait` and no others."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.card = card
        self.is_closed = False

    @property
    def has_liveness(self) -> bool:
        """It has none."""
        return False

    def warm(self) -> None:
        """Nothing to load."""

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """One face, unless nobody is inscribed."""
        del search
        if not inscription(pixels):
            return []
        landmarks = (TEMPLATE + FACE_AT).astype(np.float32)
        return [Face((float(FACE_AT), float(FACE_AT), float(CROP_SIDE), float(CROP_SIDE)), landmarks, 0.99)]

    def is_upright(self, face: Face, length: float | None) -> bool:
        """Always: faces of this engine are upright."""
        del face, length
        return True

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """See embedding_of."""
        del face
        if "|" not in (text := inscription(pixels)):  # an inverted copy
            raise LowQuality
        people, capture = text.split("|")
        return embedding_of(tuple(people.split("+")), int(capture)), 20.0

    def liveness(self, pixels: Pixels, face: Face) -> float | None:
        """It cannot tell."""
        del pixels, face

    def close(self) -> None:
        """Remember it."""
        self.is_closed = True


def _direction(seed: str) -> np.ndarray:
    digest = hashlib.sha256(seed.encode()).digest()
    return _unit(np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(DIMENSION))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)

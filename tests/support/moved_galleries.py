"""Two models that read the same photos and make unrelated embeddings, and photos that JPEG does not change too much."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from app.documents.identities import Identity
from app.domain.attributes import GivenAttributes
from app.domain.faces import Embedding, Face, ModelCard, Pixels
from app.engine.port import Search
from app.runtime import Runtime
from app.use_cases import enrol
from app.use_cases.verify import Claim, Verification, verify
from tests.builders import by_app, by_officer, default_gallery, known, screened
from tests.fakes import CARD, CROP_SIDE, FACE_AT, SIDE, TEMPLATE, FakeEngine, embedding_of

#: Side of the square that encodes one bit, in pixels: that of JPEG's own blocks.
_SQUARE = 8
OLD, NEW = CARD, replace(CARD, pack="fake-2", contract="sha256:fake-2", licence="other")


def photo_of(*people: str, capture: int = 0) -> bytes:
    """A photo of a person whose name is written in large squares."""
    text = f"{'+'.join(people)}|{capture}".encode() if people else b""
    bits = np.zeros((SIDE // _SQUARE) ** 2, np.uint8)
    written = np.unpackbits(np.frombuffer(bytes([len(text)]) + text, np.uint8))
    bits[: len(written)] = written
    squares = np.kron(bits.reshape(SIDE // _SQUARE, -1) * 180 + 30, np.ones((_SQUARE, _SQUARE), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(squares[:, :, None], 3, axis=2).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _written_on(pixels: Pixels) -> str:
    middle = _SQUARE // 2
    bits = (pixels[middle::_SQUARE, middle::_SQUARE, 0] > 120).astype(np.uint8)
    data = np.packbits(bits.ravel()).tobytes()
    text = data[1 : 1 + data[0]]
    return text.decode() if text.isascii() else ""


class SquaresEngine(FakeEngine):
    """Reads photos made by `photo_of`. Each model has its own direction for each person."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card)
        self.blind_to: set[str] = set()

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """One face. None if the photo has no person, the model is blind to the person, or the photo is turned or inverted."""
        del search
        text = _written_on(pixels)
        if "|" not in text or text.split("|")[0] in self.blind_to:
            return []
        landmarks = (TEMPLATE + FACE_AT).astype(np.float32)
        return [Face((float(FACE_AT), float(FACE_AT), float(CROP_SIDE), float(CROP_SIDE)), landmarks, 0.99)]

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """The embedding, in the model's own direction for the person."""
        del face
        people, capture = _written_on(pixels).split("|")
        return embedding_of(tuple(f"{self.card.pack}/{one}" for one in people.split("+")), int(capture)), 20.0


async def person(runtime: Runtime, *people: str, capture: int = 0, photos: int = 1) -> Identity:
    """A person who is enrolled from such photos, and screened."""
    given = [photo_of(*people, capture=capture + number) for number in range(photos)]
    gallery = await default_gallery()
    identity = await enrol.enrol(runtime, by_officer("identity.enrol"), gallery, given, GivenAttributes())
    return await screened(runtime, identity)


async def claimed(runtime: Runtime, identity: Identity, *people: str, capture: int = 9) -> Verification:
    """Whether a fresh photo shows the identity."""
    claim = Claim(await known(identity), audience=None, nonce=None)
    photo = photo_of(*people, capture=capture)
    return await verify(runtime, by_app("face.verify"), await default_gallery(), claim, photo)

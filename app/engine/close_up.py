"""Look again at a small face of a large photo, in pixels that are less reduced.

Large photos are reduced before faces are looked for. That costs a face nothing as long as it keeps the pixels that the
recogniser needs. A smaller one is cut out of the photo less reduced, and found again there, because landmarks found in the
whole photo are coarse: docs/adr/0040 has figures.
"""

from dataclasses import dataclass

from app.domain.faces import Box, PhotoFace
from app.domain.photo import Photo, PhotoReader

#: Pixels of a face's shorter side from which on the recogniser's crop of 112 pixels enlarges nothing.
ENOUGH = 80.0
#: Sides of the face's box that a close-up shows, the face in its middle: the liveness models look at four.
_AROUND = 4.5


@dataclass(frozen=True, slots=True)
class CloseUp:
    """The surroundings of a face, as a photo of their own. box: where the face should lie on it, in pixels as sent."""

    photo: Photo
    box: Box

    def shows(self, face: PhotoFace) -> bool:
        """Whether a face that was found on the close-up is the one that it was made for."""
        (x, y, width, height), (left, top, across, down) = face.box, self.box
        return left < x + width / 2 < left + across and top < y + height / 2 < top + down


def close_up(data: bytes, photo: Photo, face: PhotoFace, reader: PhotoReader) -> CloseUp | None:
    """A close-up of a face that suffers from the photo's reduction; else None. Blocking.

    photo: what the reader made of the bytes, turned or not.
    """
    side = min(face.box[2:])
    if photo.reduction == 1 or side >= ENOUGH * photo.reduction:
        return None
    reduction = next((k for k in (4, 2) if k < photo.reduction and side >= ENOUGH * k), 1)
    x, y, width, height = face.box
    half = _AROUND / 2 * max(width, height)
    left, top = max(0.0, x + width / 2 - half), max(0.0, y + height / 2 - half)
    around = (left, top, x + width / 2 + half - left, y + height / 2 + half - top)
    part = reader.decode_part(data, photo, around, reduction)
    return CloseUp(part, (x - left, y - top, width, height))

"""The port that every face engine answers to."""

from typing import Literal, Protocol

from app.domain.faces import Embedding, Face, ModelCard, Pixels

#: Which faces a search has to find. quick: those of a fifth of the long side or more. usual: also the subject of any photo, and
#: faces of a quarter of its area. thorough: also faces of a fifth of the subject's length.
Search = Literal["quick", "usual", "thorough"]


class FaceEngine(Protocol):
    """Finds faces and embeds them. Blocking: call it from the Runtime's executor; safe from several threads at once."""

    @property
    def card(self) -> ModelCard:
        """The model's card; known without loading any weights into memory."""

    @property
    def has_liveness(self) -> bool:
        """Whether `liveness` can answer."""

    def warm(self) -> None:
        """Load the weights and run once. Raises ModelUnavailable when a file is missing, cut or another."""

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """Upright faces in these pixels, largest first. A more thorough search finds the same faces, and smaller ones."""

    def is_upright(self, face: Face, length: float | None) -> bool:
        """Whether a face that `detect` found is surely upright.

        length: of its raw vector, if it was embedded. Detectors also find upside-down faces, with lower scores.
        """

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """The face's embedding (d,), unit length and centred by the contract's mean; and the raw vector's length.

        It depends on the photo and the face only: never on what else is being embedded.
        """

    def liveness(self, pixels: Pixels, face: Face) -> float | None:
        """How sure the passive models are that this is a live face, in [0, 1]; None without such models."""

    def close(self) -> None:
        """Release child processes and memory."""

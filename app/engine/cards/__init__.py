"""What is known of recognisers, found by the SHA-256 of their file.

A card says how a network wants its pixels, how its impostors score, and where that was measured. Cards are TOML files
beside this one; a pack's own `pack.toml` may carry a `[card]` of the same form and then wins.
"""

import tomllib
from functools import cache
from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rate = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(_Strict):
    """How a recogniser wants the aligned crop: (pixel - mean) * scale, per channel in the order of `channels`."""

    input_size: Annotated[int, Field(ge=32, le=512)] = 112
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    scale: tuple[float, float, float] = (1 / 127.5, 1 / 127.5, 1 / 127.5)
    channels: Literal["rgb", "bgr"] = "rgb"
    dimension: Annotated[int, Field(ge=16, le=4096)] = 512


class CardData(_Strict):
    """A recogniser's scores and their meaning.

    impostor_curve: (FMR, threshold) pairs, falling in FMR and rising in threshold. usual_length: raw vector length at
    the 1%, 50% and 99% points. centring_mean: what is taken from each unit vector before it is scaled to unit length again.
    """

    licence: str
    commercial_use: bool
    impostor_curve: Annotated[tuple[tuple[Rate, Annotated[float, Field(ge=-1, le=1)]], ...], Field(min_length=2)]
    source: str
    verify_fmr: Rate = 1e-4
    identify_fpir: Rate = 1e-3
    dedup_fpir: Rate = 1e-3
    notes: str = ""
    usual_length: tuple[float, float, float] | None = None
    centring_mean: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _curve_is_ordered(self) -> Self:
        for (fmr, threshold), (next_fmr, next_threshold) in zip(
            self.impostor_curve, self.impostor_curve[1:], strict=False
        ):
            if next_fmr >= fmr or next_threshold <= threshold:
                message = "impostor_curve must fall in FMR and rise in threshold"
                raise ValueError(message)
        return self


class KnownRecogniser(CardData):
    """A built-in card: the files that it is true for, and how they want their pixels."""

    title: str
    sha256: tuple[Sha256, ...]
    preprocessing: Preprocessing | None = None


@cache
def known_recognisers() -> tuple[KnownRecogniser, ...]:
    """Every built-in card."""
    folder = resources.files(__name__)
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return tuple(KnownRecogniser.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files)


def known_recogniser(sha256: str) -> KnownRecogniser | None:
    """The built-in card of a recogniser file, by its digest."""
    return next((card for card in known_recognisers() if sha256 in card.sha256), None)


def generic_card() -> CardData:
    """The card of a recogniser that nobody has measured: thresholds far on the strict side, and it says so.

    The curve is that of 128 independent dimensions (cosine of random unit vectors has a deviation of 1/sqrt(128) = 0.088),
    widened threefold: no trained recogniser that was measured here has impostors as high.
    """
    return CardData(
        licence="unknown: read the terms of the weights before any use",
        commercial_use=False,
        impostor_curve=((1e-1, 0.35), (1e-2, 0.47), (1e-3, 0.57), (1e-4, 0.65), (1e-6, 0.76)),
        source="generic: this recogniser was never measured; a conservative guess that will miss genuine pairs",
        notes="Measure this recogniser on labelled photos and give its pack.toml a [card] before relying on any rate.",
    )

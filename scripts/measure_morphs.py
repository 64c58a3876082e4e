"""How often a morph of two people is taken for either: `python scripts/measure_morphs.py PACK --faces DIR`.

DIR holds a folder per person. The first photos of two people, turned upright by their landmarks, are averaged; that is
what an accomplice would enrol. Both people's second photos are then compared with it, as a verification does. Two kinds
of accomplice: anybody, and the one of a hundred who looks most like the person. Prints one JSON object; docs/morphs.json
keeps it, and the threat model tells it.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.config import Settings
from app.domain.alignment import CROP_SIDE, TEMPLATE, aligned_crop
from app.domain.faces import Embedding, Face, Pixels
from app.domain.photo import decode
from app.domain.policy import GalleryPolicy
from app.domain.thresholds import threshold_at_fmr
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import Problem

#: Twice the recogniser's crop: the blend is cut out as finely as it will be looked at.
SIDE = 2 * CROP_SIDE
RATES = (1e-3, 1e-4, 1e-5)
#: Takes the most prominent face, even if others are nearly as prominent.
ANY_SHARE = GalleryPolicy(second_face_prominence=1)
ACCOMPLICES = 100


@dataclass(frozen=True, slots=True)
class Person:
    """The upright face of somebody's first photo, its embedding, and that of a second photo."""

    upright: Pixels
    first: Embedding
    second: Embedding


def read(engine: FaceEngine, file: Path) -> tuple[Pixels, Embedding] | None:
    """The face upright, and its embedding; None when the photo is refused."""
    try:
        photo = decode(file.read_bytes(), max_pixels=50_000_000)
        subject = subject_of(engine, photo, ANY_SHARE)
        return aligned_crop(subject.photo.pixels, subject.face.landmarks, SIDE), subject.vector[0]
    except Problem as problem:
        print(f"# refused: {file.parent.name}/{file.name}: {problem.slug()}", file=sys.stderr)
        return None


def people_in(engine: FaceEngine, faces: Path) -> list[Person]:
    """Everybody with two photos that are taken."""
    found = []
    for folder in sorted(path for path in faces.iterdir() if path.is_dir() and path.name != "hard"):
        files = sorted(path for path in folder.iterdir() if path.is_file())[:2]
        photos = [photo for file in files if len(files) > 1 and (photo := read(engine, file)) is not None]
        if len(photos) == 2:  # noqa: PLR2004 - a first and a second photo
            found.append(Person(photos[0][0], photos[0][1], photos[1][1]))
    return found


def morphed(engine: FaceEngine, one: Person, other: Person) -> Embedding:
    """The embedding of the two faces' mean."""
    blend = ((one.upright.astype(np.uint16) + other.upright) // 2).astype(np.uint8)
    landmarks = (TEMPLATE * (SIDE / CROP_SIDE)).astype(np.float32)
    return engine.embed(blend, Face((0.0, 0.0, float(SIDE), float(SIDE)), landmarks, 1.0))[0]


def share_taken_for_both(
    engine: FaceEngine, pairs: list[tuple[Person, Person]], rates: tuple[float, ...]
) -> dict[str, float]:
    """For each false match rate, the share of pairs whose morph both second photos verify against."""
    scores = []
    for one, other in pairs:
        morph = morphed(engine, one, other)
        scores.append(min(float(morph @ one.second), float(morph @ other.second)))
    weakest = np.array(scores)
    return {f"{rate:g}": round(float((weakest >= threshold_at_fmr(engine.card, rate)).mean()), 3) for rate in rates}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=Path("~/.insightface/models").expanduser())
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    engine = open_engine(Settings(face_model=arguments.pack, model_dir=arguments.model_dir)).engine
    engine.warm()
    people = people_in(engine, arguments.faces)
    random = np.random.default_rng(arguments.seed)
    drawn = [random.choice(len(people), 2, replace=False) for _ in range(arguments.pairs)]
    strangers = [(people[i], people[j]) for i, j in drawn]
    alike = np.array([person.first for person in people])
    chosen = []
    for index, person in enumerate(people):
        others = random.permutation([i for i in range(len(people)) if i != index])[:ACCOMPLICES]
        closest = max(others, key=lambda other: float(alike[other] @ person.first))
        chosen.append((person, people[int(closest)]))
    print(json.dumps({
        "pack": arguments.pack,
        "people": len(people),
        "verified_alone": {
            f"{rate:g}": round(float(np.mean([
                float(p.first @ p.second) >= threshold_at_fmr(engine.card, rate) for p in people
            ])), 3)
            for rate in RATES
        },
        "pairs": len(strangers),
        "taken_for_both": share_taken_for_both(engine, strangers, RATES),
        "chosen_pairs": len(chosen),
        "chosen_taken_for_both": share_taken_for_both(engine, chosen, RATES),
    }))  # fmt: skip
    engine.close()


if __name__ == "__main__":
    main()

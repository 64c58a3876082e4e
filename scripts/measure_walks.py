"""Whether added photos can lead an identity to another person: `python scripts/measure_walks.py PACK --faces DIR`.

DIR contains a folder for each person. Person A is enrolled by the first photo. Then mixes of A and an accomplice B are added,
from much of A to little, and at last a photo of B. Then B's other photos are compared, as in a verification. The script measures
pairs of random people, and pairs in which B is the person who looks most like A. It also measures which share of genuine photos
is taken, and how far the score of two different people rises from one pair of their photos to another. It prints one JSON
object. docs/walks.json has the figures, and docs/adr/0038 explains them.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure_morphs import SIDE, read

from app.config import Settings
from app.domain.alignment import CROP_SIDE, TEMPLATE
from app.domain.comparison import anchored
from app.domain.faces import Embedding, Face, Pixels
from app.domain.policy import GalleryPolicy, margin_of, thresholds_for
from app.engine.opening import open_engine
from app.engine.port import FaceEngine

MOST_PHOTOS = 10
FEWEST_PHOTOS = 2
STEPS = np.round(np.arange(0.95, 0.0, -0.05), 2)
FOUR_STEPS = (0.65, 0.5, 0.35, 0.2)


@dataclass(frozen=True, slots=True)
class Person:
    """The upright faces in the photos of one person, and their embeddings (n, d)."""

    faces: list[Pixels]
    vectors: Embedding


@dataclass(frozen=True, slots=True)
class Rule:
    """How later photos and selfies are judged. anchor: None for the former rule, which had no anchor."""

    join: float
    verify: float
    anchor: float | None
    is_chained: bool = False


def people_in(engine: FaceEngine, faces: Path) -> list[Person]:
    """Everybody with several photos that the product takes."""
    found = []
    for folder in sorted(path for path in faces.iterdir() if path.is_dir() and path.name != "hard"):
        files = sorted(path for path in folder.iterdir() if path.is_file())[:MOST_PHOTOS]
        photos = [photo for file in files if len(files) > 1 and (photo := read(engine, file)) is not None]
        if len(photos) >= FEWEST_PHOTOS:
            found.append(Person([one[0] for one in photos], np.array([one[1] for one in photos])))
    return found


def mixes(engine: FaceEngine, one: Pixels, other: Pixels) -> Embedding:
    """The embeddings of the two faces mixed, from much of one to little, by STEPS."""
    landmarks = (TEMPLATE * (SIDE / CROP_SIDE)).astype(np.float32)
    face = Face((0.0, 0.0, float(SIDE), float(SIDE)), landmarks, 1.0)
    blends = [np.rint(one * share + other * (1 - share)).clip(0, 255).astype(np.uint8) for share in STEPS]
    return np.array([engine.embed(blend, face)[0] for blend in blends])


def walks(enrolment: Embedding, added: Embedding, probes: Embedding, rule: Rule) -> bool:
    """Whether one of the probes matches after the photos in `added` were sent in, one after the other."""
    samples = list(enrolment)
    for photo in added:
        against = np.array(samples) if rule.is_chained else enrolment
        scores = (against @ photo).tolist()
        score = max(scores) if rule.anchor is None else anchored(max(scores), scores, rule.anchor)
        if score >= rule.join:
            samples.append(photo)
    for probe in probes:
        best = float((np.array(samples) @ probe).max())
        if rule.anchor is not None:
            best = anchored(best, (enrolment @ probe).tolist(), rule.anchor)
        if best >= rule.verify:
            return True
    return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=Path("~/.insightface/models").expanduser())
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    engine = open_engine(Settings(face_model=arguments.pack, model_dir=arguments.model_dir)).engine
    engine.warm()
    limits = thresholds_for(GalleryPolicy(verify_fmr=engine.card.verify_fmr), engine.card, 0)
    rules = {
        "before": Rule(limits.verify, limits.verify, None, is_chained=True),
        "enrolment alone": Rule(limits.verify, limits.verify, None),
        "join": Rule(limits.join, limits.verify, None),
        "join and anchor": Rule(limits.join, limits.verify, limits.anchor),
    }
    people = people_in(engine, arguments.faces)
    print(f"# {len(people)} people", file=sys.stderr)
    random = np.random.default_rng(arguments.seed)
    firsts = np.array([person.vectors[0] for person in people])
    anybody = [tuple(random.choice(len(people), 2, replace=False).tolist()) for _ in range(arguments.pairs)]
    likeness = firsts @ firsts.T - 2 * np.eye(len(people))
    alike = [(int(i), int(likeness[i].argmax())) for i in random.choice(len(people), arguments.pairs, replace=False)]
    walked = {}
    for kind, pairs in (("anybody", anybody), ("most alike", alike)):
        counts = {f"{rule}, {way}": 0 for rule in rules for way in ("four steps", "steps of 5%", "half at once")}
        for one, other in pairs:
            a, b = people[one], people[other]
            mixed = mixes(engine, a.faces[0], b.faces[0])
            chosen = [int(np.argmin(np.abs(STEPS - share))) for share in FOUR_STEPS]
            ways = {"four steps": mixed[chosen], "steps of 5%": mixed, "half at once": mixed[chosen[1:2]]}
            for way, added in ways.items():
                sent = np.vstack([added, b.vectors[:1]])
                for name, rule in rules.items():
                    counts[f"{name}, {way}"] += walks(a.vectors[:1], sent, b.vectors[1:], rule)
        walked[kind] = {"pairs": len(pairs)} | counts
    seconds = np.array([person.vectors[0] @ person.vectors[1] for person in people])
    all_later = np.concatenate([person.vectors[1:] @ person.vectors[0] for person in people])
    matches, lost = anchors_cost(people, limits.verify, limits.anchor)
    print(json.dumps({
        "pack": arguments.pack, "contract": engine.card.contract, "people": len(people),
        "verify": round(limits.verify, 4), "join": round(limits.join, 4), "anchor": round(limits.anchor, 4),
        "margin": round(margin_of(engine.card), 4),
        "second_photos_taken": {"before": share(seconds, limits.verify), "now": share(seconds, limits.join)},
        "later_photos": len(all_later),
        "later_photos_taken": {"before": share(all_later, limits.verify), "now": share(all_later, limits.join)},
        "genuine_matches": matches, "genuine_matches_lost_by_anchors": lost,
        "walked": walked, "rise_of_a_pairs_score": rises(people, limits.verify, random),
    }))  # fmt: skip
    engine.close()


def share(scores: Embedding, threshold: float) -> float:
    """The share of the scores that reach the threshold."""
    return round(float((scores >= threshold).mean()), 4)


def anchors_cost(people: list[Person], verify: float, anchor: float) -> tuple[int, int]:
    """How many genuine selfies match one of several enrolment photos, and how many of these an anchor refuses."""
    matches = lost = 0
    for person in people:
        for enrolled_by in range(1, min(5, len(person.vectors) - 1) + 1):
            scores = person.vectors[enrolled_by:] @ person.vectors[:enrolled_by].T
            matching = scores.max(axis=1) >= verify
            matches += int(matching.sum())
            lost += int((matching & (scores.min(axis=1) < anchor)).sum())
    return matches, lost


def rises(people: list[Person], verify: float, random: np.random.Generator) -> dict[str, float]:
    """How far the score of two different people rises above that of another pair of their photos that looked alike."""
    differences: list[float] = []
    for index, person in enumerate(people):
        for other in people[index + 1 :]:
            scores = (person.vectors @ other.vectors.T).ravel()
            for decided_on in scores[scores >= verify - 0.1][:10]:
                differences += (random.choice(scores, 5) - decided_on).tolist()
    return {f"{q:g}": round(float(np.quantile(differences, q)), 3) for q in (0.5, 0.95, 0.99, 0.999, 1.0)}


if __name__ == "__main__":
    main()

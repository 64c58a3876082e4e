"""Measure a pack on labelled photos and print its card: `python scripts/measure_card.py PACK --faces DIR`.

DIR holds a folder per person. The impostor curve comes from the first photo of every two people; the part below one in
a thousand goes on as an exponential tail. Second photos, where there are some, tell what the default rates would let pass.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.config import Settings
from app.domain.photo import decode
from app.domain.policy import GalleryPolicy
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import Problem

Scores = npt.NDArray[np.float64]

MEASURED_RATES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
TAIL_RATES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
HIGHEST_POINT = 0.99
#: Takes the most prominent face, even if others are nearly as prominent.
ANY_SHARE = GalleryPolicy(second_face_prominence=1)


def embedding_of(engine: FaceEngine, file: Path) -> tuple[Scores, float] | None:
    """The photo's embedding and its raw length; None when the photo is refused."""
    try:
        photo = decode(file.read_bytes(), max_pixels=50_000_000)
        embedding, length = subject_of(engine, photo, ANY_SHARE).vector
    except Problem as problem:
        print(f"# refused: {file.parent.name}/{file.name}: {problem.slug()}", file=sys.stderr)
        return None
    return embedding.astype(np.float64), length


def curve_of(impostors: Scores, tail_from: float) -> list[tuple[float, float]]:
    """(FMR, threshold): quantiles down to 1e-3, then the mean excess over the quantile at `tail_from` as a tail."""
    start = float(np.quantile(impostors, 1 - tail_from))
    scale = float((impostors[impostors > start] - start).mean())
    points = [(rate, float(np.quantile(impostors, 1 - rate))) for rate in MEASURED_RATES]
    points += [(rate, start + scale * float(np.log(tail_from / rate))) for rate in TAIL_RATES]
    return [(rate, round(threshold, 4)) for rate, threshold in points if threshold < HIGHEST_POINT]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack")
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=Path("~/.insightface/models").expanduser())
    parser.add_argument("--tail-from", type=float, default=1e-2)
    parser.add_argument("--centre", action="store_true", help="compute and apply a new centring mean")
    arguments = parser.parse_args()
    engine = open_engine(Settings(face_model=arguments.pack, model_dir=arguments.model_dir)).engine
    people = {
        folder.name: sorted(p for p in folder.iterdir() if p.is_file())
        for folder in sorted(arguments.faces.iterdir())
        if folder.is_dir()
    }
    people = {name: files for name, files in people.items() if files and name != "hard"}
    engine.warm()
    with ThreadPoolExecutor(2) as threads:
        firsts = dict(zip(people, threads.map(lambda f: embedding_of(engine, f[0]), people.values()), strict=True))
        seconds = dict(
            zip(
                people,
                threads.map(lambda f: embedding_of(engine, f[1]) if len(f) > 1 else None, people.values()),
                strict=True,
            )
        )
    engine.close()
    known = {name: value for name, value in firsts.items() if value is not None}
    vectors = np.array([vector for vector, _ in known.values()])
    if arguments.centre:
        mean = vectors.mean(axis=0)
        print(f"centring_mean = {[round(float(value), 5) for value in mean]}")
    scores = vectors @ vectors.T
    impostors = scores[np.triu_indices(len(vectors), 1)]
    lengths = np.quantile([length for _, length in known.values()], [0.01, 0.5, 0.99])
    genuine = np.array(
        [float(known[name][0] @ value[0]) for name, value in seconds.items() if value is not None and name in known]
    )
    print(
        f"# {len(vectors)} people, {len(impostors)} pairs, highest {impostors.max():.3f}, tail from {arguments.tail_from:g}"
    )
    print(f"impostor_curve = {[list(point) for point in curve_of(impostors, arguments.tail_from)]}")
    print(f"usual_length = {[round(float(length), 2) for length in lengths]}")
    for rate, threshold in curve_of(impostors, arguments.tail_from):
        print(
            f"# FMR {rate:g}: {threshold:.3f}, {(genuine >= threshold).mean():.1%} of {len(genuine)} second photos pass"
        )


if __name__ == "__main__":
    main()

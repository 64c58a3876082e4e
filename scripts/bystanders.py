"""Measure which face is taken when a photo shows several: `python scripts/bystanders.py --faces DIR`.

DIR contains a folder for each person. The script composes photos from cut-out heads: pairs, groups, bystanders, posters,
screens, children with parents, identity cards, mirrors, people far away. No photo is cropped around its subject. Each photo has
an expected answer: the face that a human viewer would name, a refusal, or either. The table counts the answers of the rule in
app/domain/subject.py. With --out DIR, the script saves the photos there.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from app.config import Settings
from app.domain.photo import Photo, decode, encode
from app.domain.policy import GalleryPolicy
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import MultipleFaces, Problem

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MOST_PIXELS = 25_000_000
#: Sizes of the composed photos: landscape, portrait, square, wide, and one that is large enough to be reduced.
SIZES = ((1280, 960), (960, 1280), (1000, 1000), (1600, 900), (3600, 2700))
#: Width and height of a head with hair and chin. The unit is the side of the face's box.
HEAD = (1.7, 2.1)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Head:
    """A head that is cut out of a photo. whole: the whole photo, for posters and cards. box: the face on `whole`."""

    person: str
    cut: Image.Image
    whole: Image.Image
    box: Box


@dataclass
class Scene:
    """A composed photo.

    subject: the boxes of the faces that a human viewer may name; empty if a viewer could not choose. may_refuse: whether a
    refusal is right as well.
    """

    picture: Image.Image
    subject: list[Box] = field(default_factory=list)
    may_refuse: bool = False

    def paste(self, head: Head, x: float, y: float, side: float, *, mirrored: bool = False) -> Box:
        """Paste a head so that its face is `side` wide around (x, y). Returns the face's box."""
        scale = side / (head.cut.width / HEAD[0])
        cut = head.cut.resize((max(1, round(head.cut.width * scale)), max(1, round(head.cut.height * scale))))
        cut = ImageOps.mirror(cut) if mirrored else cut
        mask = Image.new("L", cut.size, 0)
        ImageDraw.Draw(mask).ellipse((2, 2, cut.width - 2, cut.height - 2), fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(max(1, cut.width // 40)))
        shoulders = Image.new("L", self.picture.size, 0)
        ImageDraw.Draw(shoulders).ellipse((x - 1.5 * side, y + 0.75 * side, x + 1.5 * side, y + 4 * side), fill=255)
        self.picture.paste(Image.new("RGB", self.picture.size, (70, 80, 110)), (0, 0), shoulders)
        self.picture.paste(cut, (round(x - cut.width / 2), round(y - cut.height / 2)), mask)
        return (x - side / 2, y - side * 0.6, side, side * 1.2)

    def hang(self, head: Head, x: float, y: float, side: float, *, frame: int = 8, fade: float = 1.0) -> Box:
        """Paste the whole photo of a head, so that its face is `side` wide around (x, y). Returns the face's box."""
        scale = side / head.box[2]
        print_ = head.whole.resize((max(1, round(head.whole.width * scale)), max(1, round(head.whole.height * scale))))
        if fade < 1:
            print_ = Image.blend(Image.new("RGB", print_.size, (235, 235, 225)), print_, fade)
        print_ = ImageOps.expand(print_, frame, (240, 240, 240))
        left = x - (head.box[0] + head.box[2] / 2) * scale - frame
        top = y - (head.box[1] + head.box[3] / 2) * scale - frame
        self.picture.paste(print_, (round(left), round(top)))
        return (x - side / 2, y - head.box[3] * scale / 2, side, head.box[3] * scale)


Draw = Callable[["Studio"], Scene]


class Studio:
    """The heads and the random numbers of the scenes. The same seed gives the same scenes."""

    def __init__(self, people: dict[str, list[Head]], seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - scenes, no secrets
        self.people = people
        self.names = sorted(people)
        self.twice = [name for name in self.names if len(people[name]) > 1]

    def scene(self) -> Scene:
        """An empty room: a smooth gradient with some rectangles."""
        size = self.random.choice(SIZES)
        colours = np.array([[self.random.randint(60, 220) for _ in range(3)] for _ in range(4)], np.uint8).reshape(
            2, 2, 3
        )
        picture = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        for _ in range(4):
            x, y = self.random.randint(0, size[0]), self.random.randint(0, size[1])
            colour = tuple(self.random.randint(40, 230) for _ in range(3))
            draw.rectangle((x, y, x + size[0] // 8, y + size[1] // 5), fill=colour)
        return Scene(picture)

    def heads(self, count: int) -> list[Head]:
        """Heads of different people."""
        return [self.people[name][0] for name in self.random.sample(self.names, count)]

    def between(self, low: float, high: float) -> float:
        """A random number between the two."""
        return self.random.uniform(low, high)


def pair(studio: Studio) -> Scene:
    """Two people side by side, about equally large. A viewer could not choose."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.12, 0.34)
    middle, gap = width * studio.between(0.42, 0.58), side * studio.between(1.3, 2.0)
    for head, sign in zip(studio.heads(2), (-1, 1), strict=True):
        scene.paste(head, middle + sign * gap / 2, height * studio.between(0.4, 0.5), side * studio.between(0.93, 1.07))
    return scene


def group(studio: Studio) -> Scene:
    """Three to seven people in a row. A viewer could not choose."""
    scene = studio.scene()
    width, height = scene.picture.size
    count = studio.random.randint(3, 7)
    side = min(width / (count * 1.7), height * 0.25)
    for place, head in enumerate(studio.heads(count)):
        x = width / 2 + (place - (count - 1) / 2) * side * 1.6
        scene.paste(head, x, height * studio.between(0.38, 0.52), side * studio.between(0.85, 1.1))
    return scene


def bystander(studio: Studio) -> Scene:
    """A selfie with the face near the middle. One to four people in the background are smaller."""
    scene = studio.scene()
    width, height = scene.picture.size
    short = min(width, height)
    side = short * studio.between(0.28, 0.45)
    x, y = width * studio.between(0.36, 0.64), height * studio.between(0.42, 0.6)
    subject, *others = studio.heads(1 + studio.random.randint(1, 4))
    for other in others:
        small = side * studio.between(0.25, 0.5)
        away = studio.random.choice((-1, 1)) * (side * 1.0 + small * studio.between(0.6, 1.6))
        scene.paste(other, x + away, y + side * studio.between(-0.5, 0.4), small)
    scene.subject = [scene.paste(subject, x, y, side)]
    return scene


def full_length(studio: Studio) -> Scene:
    """A full-length photo of one person. Passers-by are farther away, and some are nearer the middle of the photo."""
    scene = studio.scene()
    width, height = scene.picture.size
    short = min(width, height)
    side = max(48.0, short * studio.between(0.07, 0.12))
    x, y = width * studio.between(0.35, 0.65), height * studio.between(0.2, 0.32)
    subject, *others = studio.heads(1 + studio.random.randint(1, 3))
    for other in others:
        away = studio.random.choice((-1, 1)) * side * studio.between(1.8, 3.5)
        scene.paste(other, x + away, height * studio.between(0.3, 0.55), side * studio.between(0.35, 0.5))
    scene.subject = [scene.paste(subject, x, y, side)]
    return scene


def cut_by_the_frame(studio: Studio) -> Scene:
    """A selfie. The edge of the photo cuts the face of another person, who is about as large."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.26, 0.38)
    subject, other = studio.heads(2)
    edge = studio.random.choice((0.0, float(width)))
    scene.paste(other, edge, height * studio.between(0.35, 0.55), side * studio.between(0.7, 1.0))
    scene.subject = [
        scene.paste(subject, width * studio.between(0.47, 0.53), height * studio.between(0.45, 0.55), side)
    ]
    scene.may_refuse = True
    return scene


def poster(studio: Studio) -> Scene:
    """A selfie. The face on a poster in the background is at most as large as the face of the living person."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.25, 0.4)
    subject, other = studio.heads(2)
    left = studio.random.random() < 0.5  # noqa: PLR2004 - a coin
    x = width * studio.between(0.1, 0.22) if left else width * studio.between(0.78, 0.9)
    scene.hang(other, x, height * studio.between(0.2, 0.45), side * studio.between(0.35, 1.0))
    scene.subject = [scene.paste(subject, width * studio.between(0.44, 0.56), height * studio.between(0.48, 0.6), side)]
    scene.may_refuse = True
    return scene


def small_poster(studio: Studio) -> Scene:
    """As `poster`, but the face on the poster is at most half as long. A viewer names the living person."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.25, 0.4)
    subject, other = studio.heads(2)
    x = width * studio.random.choice((0.18, 0.82))
    scene.hang(other, x, height * studio.between(0.2, 0.45), side * studio.between(0.25, 0.5))
    scene.subject = [scene.paste(subject, width * studio.between(0.44, 0.56), height * studio.between(0.48, 0.6), side)]
    return scene


def screen(studio: Studio) -> Scene:
    """As `small_poster`, in weaker colours: a video call or a television in the background."""
    scene = small_poster(studio)
    scene.picture = ImageEnhance.Color(scene.picture).enhance(0.8)
    return scene


def child_held(studio: Studio) -> Scene:
    """A parent and a child, cheek to cheek. The parent's face, which is larger, or a refusal is right."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.2, 0.32)
    parent, child = studio.heads(2)
    x, y, sign = width * studio.between(0.42, 0.58), height * studio.between(0.38, 0.48), studio.random.choice((-1, 1))
    own = scene.paste(parent, x - sign * side * 0.55, y, side)
    scene.paste(child, x + sign * side * 0.6, y + side * studio.between(0.2, 0.6), side * studio.between(0.62, 0.85))
    scene.subject, scene.may_refuse = [own], True
    return scene


def child_before_parent(studio: Studio) -> Scene:
    """A child's passport photo: the child is in the middle, and the parent's face is partly outside of the photo."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.3, 0.42)
    child, parent = studio.heads(2)
    scene.paste(
        parent,
        width * studio.random.choice((0.12, 0.88)),
        side * studio.between(-0.2, 0.1),
        side * studio.between(0.9, 1.2),
    )
    scene.subject, scene.may_refuse = [scene.paste(child, width / 2, height * studio.between(0.48, 0.56), side)], True
    return scene


def own_card_held_up(studio: Studio) -> Scene:
    """A person holds an identity card next to the face. The card shows another photo of the same person."""
    scene = studio.scene()
    width, height = scene.picture.size
    name = studio.random.choice(studio.twice)
    face, on_card = studio.people[name][:2]
    side = min(width, height) * studio.between(0.24, 0.38)
    x = width * studio.between(0.4, 0.6)
    sign = studio.random.choice((-1, 1))
    own = scene.paste(face, x, height * studio.between(0.38, 0.5), side)
    scene.hang(
        on_card, x + sign * side * 1.25, height * studio.between(0.55, 0.7), side * studio.between(0.3, 0.7), fade=0.85
    )
    scene.subject = [own]
    return scene


def others_card_held_up(studio: Studio) -> Scene:
    """A person holds the identity card of another person. The face of the living person or a refusal is right."""
    scene = studio.scene()
    width, height = scene.picture.size
    face, on_card = studio.heads(2)
    side = min(width, height) * studio.between(0.24, 0.38)
    x, sign = width * studio.between(0.4, 0.6), studio.random.choice((-1, 1))
    own = scene.paste(face, x, height * studio.between(0.38, 0.5), side)
    scene.hang(
        on_card, x + sign * side * 1.25, height * studio.between(0.55, 0.7), side * studio.between(0.3, 0.7), fade=0.85
    )
    scene.subject, scene.may_refuse = [own], True
    return scene


def _card(studio: Studio, head: Head, ghost: Head, share: float) -> tuple[Scene, Box]:
    width, height = studio.random.choice(((1012, 638), (2024, 1276), (700, 441)))
    scene = Scene(Image.new("RGB", (width, height), (225, 230, 220)))
    draw = ImageDraw.Draw(scene.picture)
    for line in range(6):
        draw.rectangle(
            (width * 0.4, height * (0.15 + 0.1 * line), width * 0.7, height * (0.18 + 0.1 * line)), fill=(90, 90, 90)
        )
    side = height * studio.between(0.24, 0.3)
    own = scene.hang(head, width * 0.2, height * 0.5, side, frame=0)
    scene.hang(
        ghost, width * 0.83, height * studio.between(0.55, 0.7), side * share, frame=0, fade=studio.between(0.45, 0.7)
    )
    return scene, own


def card_with_a_second_portrait(studio: Studio) -> Scene:
    """An identity card fills the photo. It has a second, smaller and paler portrait of the same person."""
    head = studio.heads(1)[0]
    scene, own = _card(studio, head, head, studio.between(0.45, 0.8))
    scene.subject = [own]
    return scene


def card_with_two_people(studio: Studio) -> Scene:
    """A card with portraits of two different people. The smaller one has at least 80 % of the size of the larger one."""
    head, other = studio.heads(2)
    scene, _ = _card(studio, head, other, studio.between(0.8, 1.0))
    return scene


def mirror(studio: Studio) -> Scene:
    """A person in front of a mirror. The same face appears twice, and its mirror image is smaller."""
    scene = studio.scene()
    width, height = scene.picture.size
    side = min(width, height) * studio.between(0.2, 0.32)
    head = studio.heads(1)[0]
    y, sign = height * 0.45, studio.random.choice((-1, 1))
    image = scene.paste(head, width / 2 + sign * side * 1.1, y, side * studio.between(0.6, 0.98), mirrored=True)
    own = scene.paste(head, width / 2 - sign * side * 0.7, y, side)
    scene.subject, scene.may_refuse = [own, image], True
    return scene


SCENES: dict[str, Draw] = {
    draw.__name__.replace("_", " "): draw
    for draw in (
        pair, group, bystander, full_length, cut_by_the_frame, small_poster, screen, poster, child_held, child_before_parent,
        own_card_held_up, others_card_held_up, card_with_a_second_portrait, card_with_two_people, mirror,
    )
}  # fmt: skip


def cut_out(photo: Photo, box: Box, person: str) -> Head | None:
    """The head around a face's box. None if part of it is outside of the photo."""
    x, y, width, height = box
    middle_x, middle_y, side = x + width / 2, y + height / 2 - 0.08 * height, max(width, height / 1.25)
    left, top = middle_x - HEAD[0] * side / 2, middle_y - HEAD[1] * side / 2
    right, bottom = middle_x + HEAD[0] * side / 2, middle_y + HEAD[1] * side / 2
    if left < 0 or top < 0 or right > photo.pixels.shape[1] or bottom > photo.pixels.shape[0]:
        return None
    picture = Image.fromarray(photo.pixels)
    return Head(person, picture.crop((round(left), round(top), round(right), round(bottom))), picture, box)


def heads_of(engine: FaceEngine, faces: Path, most: int) -> dict[str, list[Head]]:
    """The heads of at most `most` people, by person. Takes photos with exactly one face, at most two of each person."""
    found: dict[str, list[Head]] = {}
    for folder in sorted(path for path in faces.iterdir() if path.is_dir() and path.name != "hard"):
        for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:2]:
            try:
                photo = decode(file.read_bytes(), max_pixels=MOST_PIXELS)
            except Problem:
                continue
            seen = engine.detect(photo.pixels)
            head = cut_out(photo, seen[0].box, folder.name) if len(seen) == 1 else None
            if head is not None:
                found.setdefault(folder.name, []).append(head)
        if len(found) == most:
            break
    return found


def answer(engine: FaceEngine, scene: Scene, policy: GalleryPolicy) -> str:
    """`subject`, `refused`, `other` (the face of another person was taken), or the slug of another refusal."""
    photo = decode(encode(np.asarray(scene.picture)), max_pixels=MOST_PIXELS)
    try:
        x, y, width, height = subject_of(engine, photo, policy).main.face.box
    except MultipleFaces:
        return "refused"
    except Problem as problem:
        return problem.slug()
    middle = x + width / 2, y + height / 2
    is_subject = any(
        left <= middle[0] <= left + across and top <= middle[1] <= top + down
        for left, top, across, down in scene.subject
    )
    return "subject" if is_subject else "other"


def is_right(scene: Scene, got: str) -> bool:
    """Whether the answer is an expected one."""
    if got == "subject":
        return bool(scene.subject)
    return got == "refused" and (scene.may_refuse or not scene.subject)


def scenes(studio: Studio, each: int) -> Iterator[tuple[str, int, Scene]]:
    """Scenes of all kinds, `each` of every kind: the kind, the number and the scene."""
    for name, draw in SCENES.items():
        for number in range(each):
            yield name, number, draw(studio)


def main() -> None:
    """Compose the photos, ask for the subject of each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=Path("~/.insightface/models").expanduser())
    parser.add_argument("--model", default="buffalo_sc")
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--people", type=int, default=150)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--share", type=float, default=GalleryPolicy().second_face_prominence)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = open_engine(Settings(face_model=arguments.model, model_dir=arguments.model_dir)).engine
    engine.warm()
    policy = GalleryPolicy(second_face_prominence=arguments.share)
    studio = Studio(heads_of(engine, arguments.faces, arguments.people), arguments.seed)
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, number, scene in scenes(studio, arguments.each):
        got = answer(engine, scene, policy)
        row = table[name]
        row["right" if is_right(scene, got) else "not right"] += 1
        row[got] += 1
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            scene.picture.save(arguments.out / f"{name.replace(' ', '_')}-{number}-{got}.jpg", quality=90)
    engine.close()
    print("| photo | right | subject taken | refused as multiple-faces | another person taken | other refusals |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in table.items():
        rest = arguments.each - row["subject"] - row["refused"] - row["other"]
        print(
            f"| {name} | {row['right']} of {arguments.each} | {row['subject']} | {row['refused']} | {row['other']} | {rest} |"
        )


if __name__ == "__main__":
    main()

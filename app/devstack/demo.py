"""The demo: the platform's main job on real faces, told over its HTTP contract only.

Nothing here knows how the platform works; it looks at the answers as a caller would, and the first that is not what a
caller may expect ends it.
"""

import importlib.util
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import jwt
from PIL import Image, ImageEnhance, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.devstack.client import Caller, CallFailed, Credentials, Identity, Service

VERDICT_WAIT_SECONDS: Final = 30
GALLERY: Final = "demo"
PHOTO_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})
#: One to enrol, and one who pretends to be them.
FEWEST_PEOPLE: Final = 2
#: Where five of the six people stand on InsightFace's t1.jpg (1280 x 886; one looks aside): left, upper, right, lower of
#: a crop with a margin that holds no second face of a quarter of the size.
T1_CROPS: Final = (
    (10, 200, 220, 460),
    (215, 90, 425, 340),
    (400, 200, 630, 470),
    (680, 290, 870, 530),
    (1070, 210, 1280, 460),
)
ASTRONAUT_CROP: Final = (90, 0, 330, 250)
#: dlib's detector wants faces of 80 pixels at least: a crop is scaled up to this side.
CROP_SIDE: Final = 480
#: Tom_Hanks_54745.png is a 112 x 112 crop, cut at the face's edge: it gets a border.
TIGHT_CROP_BORDER: Final = 40
BORDER_GREY: Final = (128, 128, 128)
#: The second capture: turned, darker, less contrast, smaller, and coded anew.
TURN_DEGREES: Final = 7
LIGHT: Final = 0.82
CONTRAST: Final = 0.9
SCALE: Final = 0.85
FIRST_QUALITY: Final = 95
SECOND_QUALITY: Final = 84


class DemoFailed(RuntimeError):
    """A step of the demo went wrong; says which, and what was seen."""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with two encoded photos: one to enrol by, another one to come back with."""

    name: str
    photo: bytes
    selfie: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the demo's table."""

    step: str
    who: str
    seen: str
    seconds: float


def sample_people() -> list[Person]:
    """Seven people on sample photos of InsightFace and scikit-image. Raises DemoFailed when those are missing."""
    hanks = ImageOps.expand(
        _open(_shipped("insightface", "data/images/Tom_Hanks_54745.png")), TIGHT_CROP_BORDER, BORDER_GREY
    )
    group = _open(_shipped("insightface", "data/images/t1.jpg"))
    astronaut = _open(_shipped("skimage", "data/astronaut.png")).crop(ASTRONAUT_CROP)
    people = [("Tom Hanks", hanks), ("Eileen Collins", astronaut)]
    people += [(f"t1.jpg, person {number}", group.crop(box)) for number, box in enumerate(T1_CROPS, start=1)]
    return [_person(name, _enlarged(photo)) for name, photo in people]


def people_in(folder: Path) -> list[Person]:
    """One person per sub-folder: the first photo by name enrols, the second comes back (or the first one, changed).

    Raises DemoFailed when there are not two people at least, or a photo cannot be read.
    """
    people = []
    for own in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        photos = sorted(path for path in own.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
        if len(photos) > 1:
            people.append(Person(own.name, photos[0].read_bytes(), photos[1].read_bytes()))
        elif photos:
            people.append(Person(own.name, photos[0].read_bytes(), second_capture(_open(photos[0]))))
    if len(people) < FEWEST_PEOPLE:
        message = f"{folder} needs two sub-folders with photos at least: one person to enrol, one impostor"
        raise DemoFailed(message)
    return people


def second_capture(photo: Image.Image) -> bytes:
    """Another photo of the same face: turned, relit, scaled and encoded anew. JPEG."""
    border = photo.resize((1, 1)).getpixel((0, 0))  # the mean colour, so that the turned corners do not stand out
    turned = photo.rotate(TURN_DEGREES, resample=Image.Resampling.BICUBIC, fillcolor=border)
    relit = ImageEnhance.Contrast(ImageEnhance.Brightness(turned).enhance(LIGHT)).enhance(CONTRAST)
    size = (round(relit.width * SCALE), round(relit.height * SCALE))
    return _jpeg(relit.resize(size, Image.Resampling.LANCZOS), SECOND_QUALITY)


async def demonstrate(url: str, credentials: Credentials, people: Sequence[Person], console: Console) -> Table:
    """Do the main job with these people; the last one is the impostor, who is never enrolled.

    Returns the table of what was done. Raises DemoFailed at the first step that goes wrong.
    """
    steps = len(people) + 5
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        story = _Story(progress, steps)
        try:
            async with Service(url) as service:
                await _tell(story, service, credentials, people)
        except (CallFailed, httpx.HTTPError, jwt.PyJWTError) as problem:
            said = str(problem) or type(problem).__name__
            message = f"step '{story.step}' went wrong: {said}"
            raise DemoFailed(message) from problem
    return story.table()


class _Story:
    """Where the demo is, and what was seen so far."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("demo", total=steps)
        self._began = time.monotonic()
        self._who = ""
        self._lines: list[Line] = []
        self.step = "log in"

    def begin(self, step: str, who: str) -> None:
        self.step, self._who, self._began = step, who, time.monotonic()
        self._progress.update(self._task, description=f"{step}: {who}")

    def saw(self, seen: str) -> None:
        self._lines.append(Line(self.step, self._who, seen, time.monotonic() - self._began))
        self._progress.advance(self._task)

    def expect(self, holds: bool, seen: str) -> None:  # noqa: FBT001 - reads as a sentence
        if not holds:
            message = f"step '{self.step}' ({self._who}) went wrong: {seen}"
            raise DemoFailed(message)
        self.saw(seen)

    def table(self) -> Table:
        table = Table(title="Demo", title_justify="left")
        for column in ("step", "who", "answer"):
            table.add_column(column, overflow="fold")
        table.add_column("ms", justify="right")
        for line in self._lines:
            table.add_row(line.step, line.who, line.seen, f"{line.seconds * 1000:.0f}")
        return table


async def _tell(story: _Story, service: Service, credentials: Credentials, people: Sequence[Person]) -> None:
    story.begin("log in", "officer, relying app, auditor, admin")
    officer = await service.log_in(credentials.users.officer)
    app = await service.log_in(credentials.client)
    auditor = await service.log_in(credentials.users.auditor)
    gallery = await _own_gallery(await service.log_in(credentials.admin))
    story.saw(f"four tokens; gallery '{gallery}'")

    *members, impostor = people
    enrolled: list[Identity] = []
    for number, person in enumerate(members, start=1):
        story.begin("enrol", person.name)
        identity = await _enrol(officer, person.photo, gallery, f"DEMO-{number:04}", person.name)
        story.expect(identity.status == "active", f"{identity.status}, verdict {identity.dedup.verdict}")
        enrolled.append(identity)

    first, known = members[0], enrolled[0]
    # Somebody else comes back by selfie: the same photo is not to serve twice.
    second, second_known = members[len(members) > 1], enrolled[len(members) > 1]
    story.begin("enrol again", f"{first.name} as “Somebody Else”")
    again = await _enrol(officer, first.selfie, gallery, "DEMO-TWICE", "Somebody Else")
    case = await officer.case(again.dedup.case_id) if again.dedup.case_id else None
    looks_like = case.candidates[0] if case is not None and case.candidates else None
    held = again.status == "suspected_duplicate" and looks_like is not None and looks_like.identity.id == known.id
    score = f", looks like {first.name} at {looks_like.score:.2f}" if looks_like is not None else ""
    story.expect(held, f"{again.status}{score}")

    story.begin("authenticate", f"{second.name} by selfie")
    answer = await app.verify(second.selfie, second_known.id)
    story.expect(answer.match, f"match {answer.match}, score {answer.score}, threshold {answer.threshold:.2f}")

    story.begin("check the assertion", "relying app, with the published keys")
    claims = await service.verified_claims(answer.assertion or "", audience=credentials.client.client_id)
    story.expect(
        claims.sub == second_known.id and claims.gallery == gallery, "signature holds; it names the enrolled identity"
    )

    story.begin("refuse", f"{impostor.name} as {first.name}")
    refusal = await app.verify(impostor.selfie, known.id)
    story.expect(
        not refusal.match and refusal.assertion is None,
        f"match {refusal.match}, score {refusal.score}, threshold {refusal.threshold:.2f}",
    )

    story.begin("read the audit trail", "auditor")
    await _audit(story, auditor, gallery, enrolments=len(members) + 1)


async def _own_gallery(admin: Caller) -> str:
    """A gallery for this run alone: the people of an earlier one would be found again, as they should."""
    if await admin.create_gallery(GALLERY):
        return GALLERY
    name = f"{GALLERY}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{time.monotonic_ns() % 1000:03}"
    await admin.create_gallery(name)
    return name


async def _enrol(officer: Caller, photo: bytes, gallery: str, reference: str, name: str) -> Identity:
    return await officer.enrol(
        photo, gallery=gallery, external_ref=reference, full_name=name, wait_seconds=VERDICT_WAIT_SECONDS
    )


async def _audit(story: _Story, auditor: Caller, gallery: str, *, enrolments: int) -> None:
    """Every enrolment, verdict and verification of this run must be on the record."""
    expected = {"identity.enrol": enrolments, "dedup.verdict": enrolments, "face.verify": 2}
    counted = {
        action: len(await auditor.events(action=action, gallery=gallery, outcome="success")) for action in expected
    }
    story.expect(
        all(counted[action] >= number for action, number in expected.items()),
        ", ".join(f"{number} x {action}" for action, number in counted.items()),
    )


def _person(name: str, photo: Image.Image) -> Person:
    return Person(name, _jpeg(photo, FIRST_QUALITY), second_capture(photo))


def _enlarged(photo: Image.Image) -> Image.Image:
    factor = CROP_SIDE / min(photo.size)
    size = (round(photo.width * factor), round(photo.height * factor))
    return photo.resize(size, Image.Resampling.LANCZOS) if factor > 1 else photo


def _jpeg(photo: Image.Image, quality: int) -> bytes:
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as photo:
            return ImageOps.exif_transpose(photo).convert("RGB")
    except OSError as problem:
        message = f"{path} cannot be read as a photo: {problem}"
        raise DemoFailed(message) from problem


def _shipped(package: str, inside: str) -> Path:
    """A file that a dependency ships, found without importing it (both take seconds)."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, inside)).is_file():
            return path
    message = f"the sample photo {Path(inside).name} of {package} is missing; give photos of your own with --photos"
    raise DemoFailed(message)

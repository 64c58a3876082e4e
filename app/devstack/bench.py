"""The benchmark: the platform's main calls on a stack of its own, beside the bare model on the same photos.

What a platform adds to its models is the question, so both are measured in one run: the calls over HTTP, and, in this
process while the stack is idle, decoding, detection, embedding and liveness in as many threads as callers (cores at
most) plus one journaled transaction on the same MongoDB.
"""

import asyncio
import io
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import pymongo
from PIL import Image, ImageEnhance, ImageOps
from pydantic import BaseModel, ConfigDict
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from app.devstack.client import Caller, Credentials, Service
from app.domain.photo import PhotoReader
from app.domain.policy import GalleryPolicy
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import Problem
from app.processors import processors

PHOTO_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp"})
JPEG_QUALITY: Final = 92
#: The probe differs from the enrolled photo as a second coding does, and matches: this measures time, not accuracy.
PROBE_LIGHT: Final = 0.95
#: A mark is a row of so many squares, of as many pixels a side as a block of JPEG has.
MARK_BITS, MARK_SIDE = 14, 8
TRANSACTIONS: Final = 60
WARM_UP: Final = 4
VERDICT_POLL_SECONDS: Final = 0.02
VERDICT_LIMIT_SECONDS: Final = 120.0


class BenchFailed(RuntimeError):
    """The benchmark cannot go on; says why."""


class Figures(BaseModel):
    """What was measured at one concurrency. Rates per second, times in milliseconds.

    screened_per_s: enrolments until their verdicts were there, too. transaction_p50_ms: one journaled transaction.
    verify_ratio: verification's median over the bare model's (its wait for a core included) plus one transaction.
    verify_rate_ratio: the bare model's rate over verification's.
    """

    model_config = ConfigDict(frozen=True)

    enrol_per_s: float
    enrol_p50_ms: float
    enrol_p95_ms: float
    screened_per_s: float
    verify_p50_ms: float
    verify_p95_ms: float
    verify_per_s: float
    bare_p50_ms: float
    bare_per_s: float
    transaction_p50_ms: float
    verify_ratio: float
    verify_rate_ratio: float


class Report(BaseModel):
    """One run. start_s: from the command to the ready-file."""

    model_config = ConfigDict(frozen=True)

    start_s: float
    pack: str
    people: int
    refused: int
    concurrency: dict[str, Figures]


@dataclass(frozen=True, slots=True)
class Subject:
    """A person with a photo to enrol by and one to verify with; JPEG."""

    name: str
    photo: bytes
    probe: bytes


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of single calls and of all together, in seconds."""

    each: list[float]
    whole: float

    @property
    def per_second(self) -> float:
        """Calls done per second."""
        return len(self.each) / self.whole

    def milliseconds(self, share: float) -> float:
        """The quantile `share` of the single calls."""
        return quantile(self.each, share) * 1000


def usable_people(folder: Path, engine: FaceEngine, *, reader: PhotoReader, needed: int) -> tuple[list[Subject], int]:
    """At most `needed` people, one sub-folder each, whose first photo shows one face; and how many were passed over.

    Raises BenchFailed when there is nobody.
    """
    people: list[Subject] = []
    refused = 0
    for own in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        photo = next((path for path in sorted(own.iterdir()) if path.suffix.lower() in PHOTO_SUFFIXES), None)
        if photo is None or len(people) == needed:
            continue
        subject = _subject(own.name, photo)
        try:
            subject_of(engine, reader.decode(subject.photo), GalleryPolicy())
        except Problem:
            refused += 1
        else:
            people.append(subject)
    if not people:
        message = f"{folder} holds no usable photo: it needs one sub-folder with photos per person"
        raise BenchFailed(message)
    return people, refused


class Bench:
    """One running stack, and the photos to measure it with."""

    def __init__(self, officer: Caller, app: Caller, mongo_uri: str, engine: FaceEngine) -> None:
        self._officer = officer
        self._app = app
        self._mongo_uri = mongo_uri
        self._engine = engine
        self._serial = 0
        self._known: list[tuple[Subject, str]] = []

    @classmethod
    async def connect(cls, service: Service, credentials: Credentials, mongo_uri: str, engine: FaceEngine) -> "Bench":
        """Log in as those who enrol and verify."""
        officer = await service.log_in(credentials.users.officer)
        return cls(officer, await service.log_in(credentials.client), mongo_uri, engine)

    async def measure(self, people: Sequence[Subject], concurrency: int, *, reader: PhotoReader) -> Figures:
        """Enrol these people, verify as many times, then the bare model on the same photos."""
        enrolled: list[tuple[Subject, str]] = []

        async def enrol(subject: Subject, photo: bytes) -> None:
            identity = await self._officer.enrol(
                photo,
                gallery="default",
                external_ref=f"BENCH-{self._next()}",
                full_name=subject.name,
            )
            enrolled.append((subject, identity.id))

        photos = await self._marked([subject.photo for subject in people])
        began = time.perf_counter()
        enrolling = await timed([partial(enrol, *one) for one in zip(people, photos, strict=True)], concurrency)
        self._known += await self._active(enrolled)
        screened = len(enrolled) / (time.perf_counter() - began)
        if not self._known:
            message = "nobody became active"
            raise BenchFailed(message)

        async def verify(photo: bytes, identity_id: str) -> None:
            await self._app.verify(photo, identity_id)

        asked = list(islice(cycle(self._known), len(people)))
        probes = await self._marked([subject.probe for subject, _ in asked])
        claims = zip(probes, (identity_id for _, identity_id in asked), strict=True)
        verifying = await timed([partial(verify, *one) for one in claims], concurrency)
        threads = min(concurrency, processors())
        bare = await asyncio.to_thread(
            bare_model, self._engine, [subject.probe for subject, _ in asked], threads=threads, reader=reader
        )
        transaction_ms = await asyncio.to_thread(journaled_transaction_ms, self._mongo_uri)
        floor_ms = bare.milliseconds(0.5) * concurrency / threads + transaction_ms
        return Figures(
            enrol_per_s=round(enrolling.per_second, 2),
            enrol_p50_ms=round(enrolling.milliseconds(0.5), 1),
            enrol_p95_ms=round(enrolling.milliseconds(0.95), 1),
            screened_per_s=round(screened, 2),
            verify_p50_ms=round(verifying.milliseconds(0.5), 1),
            verify_p95_ms=round(verifying.milliseconds(0.95), 1),
            verify_per_s=round(verifying.per_second, 2),
            bare_p50_ms=round(bare.milliseconds(0.5), 1),
            bare_per_s=round(bare.per_second, 2),
            transaction_p50_ms=round(transaction_ms, 1),
            verify_ratio=round(verifying.milliseconds(0.5) / floor_ms, 2),
            verify_rate_ratio=round(bare.per_second / verifying.per_second, 2),
        )

    async def warm_up(self, people: Sequence[Subject]) -> None:
        """The first calls load what is loaded lazily; they count for nothing."""
        for subject in islice(cycle(people), WARM_UP):
            await self._officer.detect(subject.photo)

    async def _active(self, enrolled: Sequence[tuple[Subject, str]]) -> list[tuple[Subject, str]]:
        """Those of the newly enrolled who became active, once all have their verdict."""
        active = []
        deadline = time.monotonic() + VERDICT_LIMIT_SECONDS
        for subject, identity_id in enrolled:
            while (identity := await self._officer.identity(identity_id)).status == "pending":
                if time.monotonic() > deadline:
                    message = f"{identity_id} had no verdict after {VERDICT_LIMIT_SECONDS:g} s"
                    raise BenchFailed(message)
                await asyncio.sleep(VERDICT_POLL_SECONDS)
            if identity.status == "active":
                active.append((subject, identity_id))
        return active

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    async def _marked(self, photos: Sequence[bytes]) -> list[bytes]:
        """The photos as pictures that were never sent before: no call is a replay of another."""
        numbers = [self._next() for _ in photos]
        return await asyncio.to_thread(lambda: [marked(*one) for one in zip(photos, numbers, strict=True)])


async def timed(calls: Sequence[Callable[[], Awaitable[None]]], concurrency: int) -> Timing:
    """Make all calls, so many at a time. The first that fails ends it."""
    each: list[float] = []
    waiting = iter(calls)

    async def caller(todo: Iterator[Callable[[], Awaitable[None]]]) -> None:
        for call in todo:
            began = time.perf_counter()
            await call()
            each.append(time.perf_counter() - began)

    began = time.perf_counter()
    callers = [asyncio.create_task(caller(waiting)) for _ in range(concurrency)]
    try:
        await asyncio.gather(*callers)
    finally:
        for task in callers:
            task.cancel()
    return Timing(each, time.perf_counter() - began)


def bare_model(engine: FaceEngine, photos: Sequence[bytes], *, threads: int, reader: PhotoReader) -> Timing:
    """Decode, detect, embed, and look for liveness where there are models for it: nothing else, in so many threads."""

    def once(data: bytes) -> float:
        began = time.perf_counter()
        subject = subject_of(engine, reader.decode(data), GalleryPolicy())
        engine.liveness(subject.photo.pixels, subject.face)
        return time.perf_counter() - began

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(once, photos[: threads * WARM_UP]))
        began = time.perf_counter()
        each = list(pool.map(once, photos))
        return Timing(each, time.perf_counter() - began)


def journaled_transaction_ms(uri: str) -> float:
    """The median of a transaction of two inserts, acknowledged by a majority's journal; in milliseconds."""
    each = []
    with closing(pymongo.MongoClient[dict[str, object]](uri)) as client, client.start_session() as session:
        database = client["idem_bench"]
        database["one"].insert_one({})
        database["two"].insert_one({})
        for number in range(TRANSACTIONS):
            began = time.perf_counter()
            with session.start_transaction(ReadConcern("snapshot"), WriteConcern("majority", j=True)):
                database["one"].insert_one({"number": number}, session=session)
                database["two"].insert_one({"number": number}, session=session)
            each.append(time.perf_counter() - began)
        client.drop_database("idem_bench")
    return statistics.median(each) * 1000


def marked(jpeg: bytes, number: int) -> bytes:
    """The JPEG with the number along its upper edge, in black and white: for each number another picture.

    Raises ValueError for a picture that is too narrow.
    """
    with Image.open(io.BytesIO(jpeg)) as opened:
        photo = opened.convert("RGB")
    if photo.width < MARK_BITS * MARK_SIDE:
        message = f"a photo of {photo.width} pixels is too narrow for a mark"
        raise ValueError(message)
    for bit in range(MARK_BITS):
        colour = (255, 255, 255) if number >> bit & 1 else (0, 0, 0)
        photo.paste(colour, (bit * MARK_SIDE, 0, (bit + 1) * MARK_SIDE, MARK_SIDE))
    return _jpeg(photo)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _subject(name: str, path: Path) -> Subject:
    with Image.open(path) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
    return Subject(name, _jpeg(photo), _jpeg(ImageEnhance.Brightness(photo).enhance(PROBE_LIGHT)))


def _jpeg(photo: Image.Image) -> bytes:
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()

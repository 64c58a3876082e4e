"""What end-to-end tests build: callers, galleries, photos of people, enrolments; and what every refusal must look like."""

import base64
import io
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageFilter

from app.devstack.bench import marked
from app.devstack.client import ReadyStack
from app.devstack.demo import Person, sample_people

#: A page of the contract, checked field by field by the test that asked for it.
Page = dict[str, Any]

REPOSITORY = Path(__file__).parents[2]
#: Real, labelled faces beside the repository, where there are any.
FACES = REPOSITORY.parent / "shared" / "faces"
#: Of these both photos are good enough for every model.
PORTRAYED = (
    "adel_al_jubeir", "alejandro_atchugarry", "alex_lacamoire", "barack_obama", "barrett_jackman", "deepface_jeff",
)  # fmt: skip
NOBODY = "01a1fc00-0000-7000-8000-000000000000"
TIMEOUT_SECONDS = 60.0

IDENTITY_FIELDS = {
    "id", "gallery", "external_ref", "full_name", "date_of_birth", "metadata", "status", "samples", "dedup",
    "created_at", "created_by", "updated_at", "version",
}  # fmt: skip
SAMPLE_FIELDS = {"id", "status", "quality", "liveness", "faces_found", "box", "stored_box", "created_at"}
QUALITY_FIELDS = {"score", "sharpness", "brightness", "yaw", "pitch", "roll", "face_size", "issues"}
DEDUP_FIELDS = {"job_id", "state", "verdict", "case_id", "candidate_count"}


@dataclass(frozen=True, slots=True)
class Service:
    """A running service, and an HTTP client for each role."""

    url: str
    client_id: str
    anonymous: httpx.Client
    admin: httpx.Client
    officer: httpx.Client
    auditor: httpx.Client
    app: httpx.Client

    def close(self) -> None:
        """Close the connections."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, httpx.Client):
                value.close()


@contextmanager
def open_service(ready: ReadyStack) -> Iterator[Service]:
    """Everybody of the ready-file, logged in."""
    credentials = ready.credentials()
    assert credentials is not None
    users = credentials.users
    service = Service(
        url=ready.url,
        client_id=credentials.client.client_id,
        anonymous=httpx.Client(base_url=ready.url, timeout=TIMEOUT_SECONDS),
        admin=log_in(ready.url, grant_type="password", **credentials.admin.model_dump()),
        officer=log_in(ready.url, grant_type="password", **users.officer.model_dump()),
        auditor=log_in(ready.url, grant_type="password", **users.auditor.model_dump()),
        app=log_in(ready.url, grant_type="client_credentials", **credentials.client.model_dump()),
    )
    try:
        yield service
    finally:
        service.close()


def log_in(url: str, **form: str) -> httpx.Client:
    """A client that sends the access token for these credentials."""
    answer = httpx.post(f"{url}/v1/auth/token", data=form, timeout=TIMEOUT_SECONDS)
    assert answer.status_code == 200, answer.text
    token = answer.json()["access_token"]
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_SECONDS)


@contextmanager
def user_with(service: Service, *roles: str, galleries: list[str] | None = None) -> Iterator[httpx.Client]:
    """A new person with these roles, logged in."""
    username, password = unique("user"), unique("a long password")
    made = service.admin.post(
        "/v1/users", json={"username": username, "password": password, "roles": roles, "galleries": galleries}
    )
    assert made.status_code == 201, made.text
    with log_in(service.url, grant_type="password", username=username, password=password) as client:
        yield client


@contextmanager
def app_with(
    service: Service, galleries: list[str] | None = None, audiences: list[str] | None = None
) -> Iterator[httpx.Client]:
    """A new client application, logged in."""
    made = service.admin.post(
        "/v1/clients", json={"name": unique("app"), "galleries": galleries, "audiences": audiences or []}
    )
    assert made.status_code == 201, made.text
    page = made.json()
    credentials = {"client_id": page["client_id"], "client_secret": page["client_secret"]}
    with log_in(service.url, grant_type="client_credentials", **credentials) as client:
        yield client


def unique(prefix: str) -> str:
    """A name that nobody had before."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def new_gallery(service: Service, **policy: object) -> str:
    """A gallery of one's own; its name."""
    made = service.admin.post("/v1/galleries", json={"name": unique("e2e"), "policy": policy})
    assert made.status_code == 201, made.text
    return str(made.json()["name"])


@cache
def people() -> tuple[Person, ...]:
    """People with a photo and a second capture each, on every machine."""
    return tuple(sample_people())


def portrayed() -> Iterator[Person]:
    """The sample people; and where there are real photos of different days, a few people with two of those each."""
    yield from people()
    for name in PORTRAYED:
        first, second = FACES / name / "1.jpg", FACES / name / "2.jpg"
        if second.exists():
            yield Person(name, first.read_bytes(), second.read_bytes())


_NUMBERS = itertools.count(1)


def again(photo: bytes) -> bytes:
    """The photo with a small mark of its own in a corner, as a JPEG: another picture, so that it is no replay."""
    return marked(photo, next(_NUMBERS))


def part(photo: bytes, name: str = "photo") -> tuple[str, tuple[str, bytes]]:
    """A file part."""
    return name, ("photo.jpg", photo)


def base64_of(photo: bytes) -> str:
    """As JSON carries it."""
    return base64.b64encode(photo).decode()


def enrol(service: Service, gallery: str, photo: bytes, **more: str) -> Page:
    """Enrol by one photo and wait for the verdict; the identity."""
    answer = service.officer.post(
        "/v1/identities", params={"wait": 30}, files=[part(photo)], data={"gallery": gallery, **more}
    )
    assert answer.status_code == 201, answer.text
    page: Page = answer.json()
    return page


def identity(service: Service, identity_id: str) -> Page:
    """The identity as it is now."""
    answer = service.officer.get(f"/v1/identities/{identity_id}")
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


def verify(caller: httpx.Client, photo: bytes, **fields: str) -> httpx.Response:
    """Ask whether the selfie shows the identity."""
    return caller.post("/v1/verifications", files=[part(photo)], data=fields)


def identify(caller: httpx.Client, photo: bytes, **fields: str) -> httpx.Response:
    """Ask who it is."""
    return caller.post("/v1/identifications", files=[part(photo)], data=fields)


def problem(answer: httpx.Response, status: int, slug: str) -> Page:
    """The refusal's page, checked to be of RFC 9457's shape and of this slug."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/problem+json"
    page: Page = answer.json()
    assert set(page) == {"type", "title", "status", "detail", "instance", "request_id", "errors"}
    assert page["type"].rpartition("/")[2] == slug, page
    assert page["status"] == status
    assert page["request_id"] == answer.headers["x-request-id"]
    assert page["title"]
    for error in page["errors"]:
        assert set(error) == {"field", "code", "message"}
        assert error["code"]
        assert error["message"]
    return page


def jpeg(picture: Image.Image, *, orientation: int | None = None, quality: int = 95) -> bytes:
    """The picture as a JPEG; with an EXIF orientation where one is named."""
    encoded = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture.save(encoded, "JPEG", quality=quality, exif=exif.tobytes() if orientation is not None else b"")
    return encoded.getvalue()


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The picture in another format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(photo: bytes) -> Image.Image:
    """The photo's pixels, RGB."""
    return Image.open(io.BytesIO(photo)).convert("RGB")


def meadow(width: int = 640, height: int = 480) -> Image.Image:
    """A picture without anybody: a sky that turns into grass."""
    slope = Image.linear_gradient("L").resize((width, height))
    return Image.merge(
        "RGB",
        (slope.point(lambda v: 180 - v // 2), slope.point(lambda v: 200 - v // 4), slope.point(lambda v: 230 - v)),
    )


def side_by_side(one: bytes, other: bytes) -> Image.Image:
    """Two people on one picture."""
    pictures = [opened(photo).resize((400, 400)) for photo in (one, other)]
    both = Image.new("RGB", (800, 400))
    for number, picture in enumerate(pictures):
        both.paste(picture, (400 * number, 0))
    return both


def pasted_small(photo: bytes, side: int) -> Image.Image:
    """Somebody far away on an empty wall."""
    wall = Image.new("RGB", (640, 480), (150, 150, 150))
    wall.paste(opened(photo).resize((side, side), Image.Resampling.LANCZOS), (280, 200))
    return wall


def blurred(photo: bytes, radius: int) -> Image.Image:
    """Out of focus."""
    return opened(photo).filter(ImageFilter.GaussianBlur(radius))

"""Photos that cannot serve: each is refused under its own name, with advice to the person, and leaves nothing behind."""

import csv
import gzip
import io
import struct
import time
import zlib
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from PIL import Image

from app.devstack.demo import T1_CROPS
from app.domain.faces import PhotoFace
from app.domain.policy import GalleryPolicy
from app.domain.subject import prominences
from tests.e2e.builders import (
    FACES,
    Page,
    Service,
    again,
    base64_of,
    blurred,
    encoded,
    enrol,
    jpeg,
    meadow,
    new_gallery,
    opened,
    part,
    pasted_small,
    people,
    problem,
    side_by_side,
    verify,
)
from tests.support.picture_files import heif_file, jpeg2000_file

REFUSED_WITHIN_SECONDS = 2.0
MOST_BYTES = 20 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bad:
    """A photo that must be refused, and how. slugs: any of them; dlib's detector sees small faces less well."""

    photo: bytes
    status: int
    slugs: tuple[str, ...]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def animated(kind: str) -> bytes:
    """Three frames."""
    frames = [opened(person.photo).resize((320, 320)) for person in people()[:3]]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def bad_photos() -> dict[str, Bad]:
    """One or more photos for each refusal."""
    photo, other = people()[2].photo, people()[3].photo
    picture = opened(photo)
    half = picture.crop((0, 0, picture.width // 2, picture.height))
    unreadable = ("undecodable-image",)
    unknown = ("unsupported-media-type",)
    return {
        "nobody": Bad(jpeg(meadow()), 422, ("no-face",)),
        "black": Bad(jpeg(Image.new("RGB", (400, 400))), 422, ("no-face",)),
        "white": Bad(encoded(Image.new("RGB", (400, 400), "white"), "PNG"), 422, ("no-face",)),
        "two people": Bad(jpeg(side_by_side(photo, other)), 422, ("multiple-faces",)),
        "far away": Bad(jpeg(pasted_small(photo, 44)), 422, ("face-too-small", "no-face")),
        "stamp": Bad(jpeg(picture.resize((30, 30))), 422, ("face-too-small",)),
        "half a face": Bad(jpeg(half), 422, ("face-cropped", "no-face")),
        "out of focus": Bad(jpeg(blurred(photo, 14)), 422, ("low-quality", "no-face")),
        "in the dark": Bad(jpeg(picture.point(lambda value: value // 16)), 422, ("low-quality", "no-face")),
        "cut at 10%": Bad(photo[: len(photo) // 10], 422, unreadable),
        "cut off": Bad(photo[: len(photo) // 2], 422, unreadable),
        "cut at 99%": Bad(photo[: len(photo) * 99 // 100], 422, unreadable),
        "noise after a header": Bad(photo[:200] + bytes(range(256)) * 40, 422, unreadable),
        "empty PNG": Bad(b"\x89PNG\r\n\x1a\n", 422, unreadable),
        "cut at 50%, with an end marker": Bad(photo[: len(photo) // 2] + b"\xff\xd9", 422, unreadable),
        "cut HEIC": Bad(heif_file(picture)[:-500], 422, unreadable),
        "cut AVIF": Bad(heif_file(picture, "AVIF")[:-500], 422, unreadable),
        "cut JPEG 2000": Bad(jpeg2000_file(picture)[:-500], 422, unreadable),
        "moving AVIF": Bad(
            heif_file(picture, "AVIF", save_all=True, append_images=[picture]), 422, ("animated-image",)
        ),
        "cut WebP": Bad(encoded(picture, "WEBP")[:500], 422, unreadable),
        "moving PNG": Bad(animated("PNG"), 422, ("animated-image",)),
        "moving WebP": Bad(animated("WEBP"), 422, ("animated-image",)),
        "GIF": Bad(encoded(picture, "GIF"), 415, unknown),
        "moving GIF": Bad(animated("GIF"), 415, unknown),
        "TIFF": Bad(encoded(picture, "TIFF"), 415, unknown),
        "BMP": Bad(encoded(picture, "BMP"), 415, unknown),
        "empty AVIF": Bad(b"\0\0\0\x1cftypavif" + bytes(64), 422, unreadable),
        "PSD": Bad(b"8BPS\0\1" + bytes(64), 415, unknown),
        "EPS": Bad(b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, unknown),
        "empty JPEG 2000": Bad(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), 422, unreadable),
        "FITS": Bad(b"SIMPLE  =                    T", 415, unknown),
        "WMF": Bad(b"\xd7\xcd\xc6\x9a" + bytes(64), 415, unknown),
        "PDF": Bad(b"%PDF-1.7", 415, unknown),
        "HTML": Bad(b"<!doctype html><script>1</script>", 415, unknown),
        "ZIP": Bad(b"PK\x03\x04" + bytes(64), 415, unknown),
        "gzip": Bad(gzip.compress(bytes(1_000_000)), 415, unknown),
        "a GIF that is a script": Bad(b"GIF89a/*" + bytes(32) + b"*/=1;alert(1)", 415, unknown),
        "SVG with an entity": Bad(
            b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>', 415, unknown
        ),
        "empty HEIC": Bad(b"\0\0\0\x18ftypheic" + bytes(64), 422, unreadable),
        "video": Bad(b"\0\0\0\x18ftypisom" + bytes(64), 415, unknown),
        "SVG": Bad(b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", 415, unknown),
        "program": Bad(b"\x7fELF" + bytes(64), 415, unknown),
        "text": Bad(b"no photo at all", 415, unknown),
        "bomb": Bad(png_of_size(20_000, 20_000), 413, ("too-many-pixels",)),
        "just too many": Bad(png_of_size(6000, 4200), 413, ("too-many-pixels",)),
        "bomb under the library's limit": Bad(png_of_size(9_430, 9_430), 413, ("too-many-pixels",)),
        "very high": Bad(png_of_size(1, 65_535), 413, ("too-many-pixels",)),
        "a ribbon": Bad(png_of_size(500, 100), 422, unreadable),
        "noise": Bad(encoded(Image.effect_noise((400, 400), 90), "PNG"), 422, ("no-face", "low-quality")),
        "very wide": Bad(png_of_size(65_000, 1), 413, ("too-many-pixels",)),
        "very large": Bad(photo + b"\0" * MOST_BYTES, 413, ("too-large",)),
        "nothing": Bad(b"", 422, ("validation",)),
    }


BAD = bad_photos()
#: What `hard/manifest.csv` calls a photo, and what may be said of it: "" stands for taking it.
HARD = {
    "several_people": {"multiple-faces"},
    "no_face": {"no-face"},
    "unreadable": {"undecodable-image", "unsupported-media-type", "validation"},
    "truncated": {"undecodable-image"},
    "gif": {"unsupported-media-type"},
    "bmp": {"unsupported-media-type"},
    "tiff": {"unsupported-media-type"},
    "huge_dimensions": {"too-many-pixels"},
    "very_small_face": {"face-too-small", "no-face"},
    "partial_face": {"face-cropped"},
    "dark": {"low-quality", "no-face", "face-too-small", ""},
    "overexposed": {"low-quality", "no-face"},
    "exif_orientation_2": {""},
    "exif_orientation_3": {""},
    "exif_orientation_6": {""},
    "exif_orientation_8": {""},
    "webp": {""},
    "png": {""},
    "greyscale": {""},
    "png_alpha": {""},
    "png_16bit": {""},
    "png_palette": {""},
    "cmyk_jpeg": {""},
    "progressive_jpeg": {""},
    "wrong_extension": {""},
}


#: Dogs in whom a detector may see a face.
TAKEN_FOR_PEOPLE = {"hard/none_dogs.jpg"}


def slug_of(answer: httpx.Response) -> str:
    """The refusal's name; empty when the photo was taken."""
    assert answer.status_code < 500, answer.text
    return "" if answer.is_success else str(answer.json()["type"]).rpartition("/")[2]


@pytest.mark.parametrize("name", BAD)
def test_h01_h02_h03_h04_h05_h06_h08_h14_h15_h16_h17_h18_h20_h24_h26_a_bad_photo_is_refused_and_leaves_nothing(
    service: Service, gallery: str, name: str
) -> None:
    bad = BAD[name]
    began = time.monotonic()
    answer = service.officer.post("/v1/identities", files=[part(bad.photo)], data={"gallery": gallery})
    took = time.monotonic() - began
    page = problem(answer, bad.status, slug_of(answer))
    assert slug_of(answer) in bad.slugs
    assert page["errors"], "a refusal advises the person"
    assert took < REFUSED_WITHIN_SECONDS
    counts = service.officer.get(f"/v1/galleries/{gallery}").json()["counts"]
    assert counts == {"identities": 0, "samples": 0}


def test_h24_probes_are_refused_by_the_same_names(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[2].photo)
    for name in ("nobody", "two people", "cut off", "moving PNG", "GIF", "bomb"):
        bad = BAD[name]
        for answer in (
            verify(service.app, bad.photo, identity_id=made["id"]),
            service.app.post("/v1/identifications", files=[part(bad.photo)], data={"gallery": gallery}),
            service.app.post("/v1/faces/quality", files=[part(bad.photo)], data={"gallery": gallery}),
            service.app.post("/v1/identifications", json={"gallery": gallery, "photo_base64": base64_of(bad.photo)}),
            service.officer.post(f"/v1/identities/{made['id']}/samples", files=[part(bad.photo)]),
        ):
            page = problem(answer, bad.status, bad.slugs[0])
            assert page["errors"][0]["field"].startswith("photo")
    assert verify(service.app, people()[2].selfie, identity_id=made["id"]).json()["match"]


def test_a_refusal_names_the_photo_that_it_is_about(service: Service) -> None:
    good, bad = people()[2].photo, BAD["cut off"].photo
    for bad_one, files in (
        ("photo_a", [part(bad, "photo_a"), part(good, "photo_b")]),
        ("photo_b", [part(good, "photo_a"), part(bad, "photo_b")]),
    ):
        page = problem(service.app.post("/v1/comparisons", files=files), 422, "undecodable-image")
        assert page["errors"][0]["field"] == bad_one


def test_h25_where_a_live_face_is_required_a_photo_of_a_photo_is_refused(service: Service) -> None:
    gallery = new_gallery(service, liveness="required")
    answer = service.officer.post("/v1/identities", files=[part(people()[0].photo)], data={"gallery": gallery})
    assert problem(answer, 422, "not-live")["errors"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_h10_a_turned_photo_is_the_same_face_when_exif_says_how_it_is_turned(
    service: Service, orientation: int
) -> None:
    upright = opened(people()[2].photo)
    turns = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    turn = turns[orientation]
    turned = jpeg(upright if turn is None else upright.transpose(turn), orientation=orientation)
    files = [part(jpeg(upright), "photo_a"), part(turned, "photo_b")]
    answer = service.officer.post("/v1/comparisons", files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["score"] >= 0.98


@pytest.mark.parametrize(
    "kind", ["PNG", "WEBP", "grey", "grey PNG", "palette", "alpha", "CMYK", "progressive", "1 bit"]
)
def test_h13_usual_codings_show_the_same_face(service: Service, kind: str) -> None:
    picture = opened(people()[2].photo)
    with_alpha = picture.copy()
    with_alpha.putalpha(255)
    coded = {
        "PNG": lambda: encoded(picture, "PNG"),
        "WEBP": lambda: encoded(picture, "WEBP", quality=90),
        "grey": lambda: encoded(picture.convert("L"), "JPEG"),
        "grey PNG": lambda: encoded(picture.convert("L"), "PNG"),
        "palette": lambda: encoded(picture.quantize(128), "PNG"),
        "alpha": lambda: encoded(with_alpha, "PNG"),
        "CMYK": lambda: encoded(picture.convert("CMYK"), "JPEG"),
        "progressive": lambda: encoded(picture, "JPEG", progressive=True),
        "1 bit": lambda: encoded(picture.convert("1"), "PNG"),
    }[kind]()
    files = [part(people()[2].photo, "photo_a"), part(coded, "photo_b")]
    answer = service.app.post("/v1/comparisons", files=files)
    assert slug_of(answer) in {"", "low-quality", "no-face"} if kind == "1 bit" else answer.json()["match"]


@pytest.mark.parametrize("declared", ["text/plain", "image/gif", "application/x-evil"])
def test_h07_h08_h28_the_declared_type_and_the_file_name_mean_nothing(service: Service, declared: str) -> None:
    for name in ("../../etc/passwd", "CON", "x" * 4000, "a\u202egpj.exe"):
        files = {"photo": (name, people()[2].photo, declared)}
        assert service.app.post("/v1/faces/detect", files=files).status_code == 200
    wrong = {"photo": ("a.jpg", b"%PDF-1.7", "image/jpeg")}
    problem(service.app.post("/v1/faces/detect", files=wrong), 415, "unsupported-media-type")


def test_h09_h11_appended_bytes_and_metadata_are_not_kept(service: Service, gallery: str) -> None:
    told = b"Exif\0\0 a stowaway: 52.5 north, 13.4 east"
    photo = people()[2].photo
    commented = photo[:2] + b"\xff\xe1" + (len(told) + 2).to_bytes(2, "big") + told + photo[2:]
    made = enrol(service, gallery, commented + b"PK\x03\x04 <script>a stowaway</script>")
    stored = service.officer.get(f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo")
    assert b"stowaway" not in stored.content
    assert stored.headers["content-disposition"].startswith("attachment")
    assert stored.headers["x-content-type-options"] == "nosniff"
    assert not dict(Image.open(io.BytesIO(stored.content)).getexif())


@pytest.mark.parametrize("profile", [b"", b"rubbish", bytes(60_000)], ids=["empty", "rubbish", "huge"])
def test_h12_a_colour_profile_is_nothing_to_fall_over(service: Service, profile: bytes) -> None:
    picture = opened(people()[2].photo)
    for coded in (
        encoded(picture, "JPEG", icc_profile=profile),
        encoded(picture.convert("CMYK"), "JPEG", icc_profile=profile),
    ):
        assert service.app.post("/v1/faces/detect", files=[part(coded)]).status_code == 200


def test_h19_a_photo_of_thousands_of_passes_is_refused_in_time(service: Service) -> None:
    photo = encoded(opened(people()[2].photo), "JPEG", progressive=True)
    last = photo.rindex(b"\xff\xda")
    many = photo[:last] + photo[last:-2] * 3000 + photo[-2:]
    began = time.monotonic()
    answer = service.app.post("/v1/faces/detect", files=[part(many[: MOST_BYTES // 2])])
    problem(answer, 422, "undecodable-image")
    assert time.monotonic() - began < REFUSED_WITHIN_SECONDS


def test_h11_a_malicious_exif_does_not_hang(service: Service) -> None:
    loop = b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0" + b"\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" + b"\x08\0\0\0"
    photo = people()[2].photo
    looped = photo[:2] + b"\xff\xe1" + (len(loop) + 2).to_bytes(2, "big") + loop + photo[2:]
    began = time.monotonic()
    assert service.app.post("/v1/faces/detect", files=[part(looped)]).status_code == 200
    assert time.monotonic() - began < REFUSED_WITHIN_SECONDS


def test_a_bystander_far_behind_is_left_alone_and_the_policy_says_how_far(service: Service) -> None:
    picture = opened(people()[2].photo).resize((600, 600))
    wide = Image.new("RGB", (900, 600), (150, 150, 150))
    wide.paste(picture, (0, 0))
    bystander = opened(people()[3].photo).resize((240, 240))
    wide.paste(bystander, (640, 100))
    photo = jpeg(wide)
    faces = service.app.post("/v1/faces/detect", files=[part(photo)]).json()["faces"]
    assert len(faces) == 2
    seen = [PhotoFace(tuple(f["box"]), np.array(f["landmarks"], np.float32), f["detection_score"]) for f in faces]
    share = prominences(seen, (900, 600))[1][1]
    assert 0 < share < GalleryPolicy().second_face_prominence

    def taken(second_face_prominence: float) -> str:
        gallery = new_gallery(service, second_face_prominence=second_face_prominence)
        return slug_of(service.officer.post("/v1/identities", files=[part(again(photo))], data={"gallery": gallery}))

    assert (taken(min(1.0, share * 1.2)), taken(share * 0.8)) == ("", "multiple-faces")


def hard_photos() -> list[Page]:
    """The awkward photos beside the repository, where there are any."""
    manifest = FACES / "hard" / "manifest.csv"
    return list(csv.DictReader(io.StringIO(manifest.read_text()))) if manifest.exists() else []


def test_awkward_real_photos_are_taken_or_refused_as_their_condition_says(service: Service) -> None:
    gallery = new_gallery(service)
    # dlib overlooks faces of less than 80 pixels, and so the people behind the largest one.
    has_dlib = service.admin.get("/v1/system").json()["model"]["kind"] == "dlib"
    overlooked = {"several_people"} if has_dlib else set()
    wrong = {}
    for row in hard_photos():
        photo = (FACES / row["file"]).read_bytes()
        answer = service.app.post("/v1/identifications", files=[part(photo)], data={"gallery": gallery})
        said = slug_of(answer)
        is_let_in = said == "" and row["condition"] in overlooked
        # The detector may see a face in a photo of a dog. Such a face may be refused as too poor.
        is_let_in = is_let_in or (said in {"", "low-quality"} and row["file"] in TAKEN_FOR_PEOPLE)
        if not is_let_in and said not in HARD.get(row["condition"], {said}):
            wrong[row["file"]] = said
    assert wrong == {}


def test_a_group_photo_of_the_dependencies_has_all_its_faces(service: Service) -> None:
    everybody = Image.new("RGB", (1280, 480))
    for number, person in enumerate(people()[2:6]):
        everybody.paste(opened(person.photo).resize((320, 400)), (320 * number, 40))
    assert len(T1_CROPS) >= 4
    page = service.app.post("/v1/faces/detect", files=[part(jpeg(everybody))]).json()
    assert len(page["faces"]) == 4

"""One photo in every format, colour mode, profile and orientation gives one template, or a clear refusal.

With the cases of public bug reports beside the repository, their right answers too.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from app.domain.faces import Embedding
from app.domain.photo import PhotoReader
from app.domain.policy import GalleryPolicy
from app.domain.thresholds import threshold_at_fmr
from app.engine.decoders import IsolatedDecoders
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import read_face
from app.errors import AnimatedImage, LowQuality, NoFace, Problem, UndecodableImage, UnsupportedMediaType
from tests.contract.test_engines import kinds_here, settings_for
from tests.support import picture_files
from tests.support.photos import ASTRONAUT
from tests.support.picture_files import heif_file, jpeg2000_file

REPOSITORY = Path(__file__).parents[2]
CASES = REPOSITORY.parent / "shared" / "cases"
POLICY = GalleryPolicy(liveness="off", quality="standard")
SAME, SAME_CONVERTED = 0.98, 0.90

PORTRAIT = Image.open(ASTRONAUT).convert("RGB").crop((90, 0, 346, 256))
#: Each orientation, and how a camera stores the upright picture then.
STORED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.fixture(scope="module")
def reader() -> Iterator[PhotoReader]:
    opened = PhotoReader(isolated=IsolatedDecoders())
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["dlib", *[kind for kind in kinds_here() if kind == "insightface"]])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaceEngine]:
    opened = open_engine(settings_for(request.param, tmp_path_factory.mktemp("models")), device="cpu").engine
    opened.warm()
    yield opened
    opened.close()


def template(engine: FaceEngine, reader: PhotoReader, data: bytes) -> Embedding:
    return read_face(engine, data, POLICY, reader).embedding


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _profile(*, is_broken: bool = False) -> bytes:
    # Another white and other primaries: it stands for Display P3, which Pillow cannot make.
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return whole[:200] + b"rubbish" * 500 if is_broken else whole


def _sixteen_bits() -> bytes:
    """A PNG of 16 bits a colour."""
    deep = np.asarray(PORTRAIT).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    head = struct.pack(">IIBBBBB", *PORTRAIT.size, 16, 2, 0, 0, 0)
    chunk = picture_files.png_chunk
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _see_through(alpha: int) -> Image.Image:
    clear = PORTRAIT.convert("RGBA")
    mask = Image.new("L", clear.size, 255)
    mask.paste(alpha, (0, 0, clear.width, 8))
    clear.putalpha(mask)
    return clear


def _grey16() -> Image.Image:
    return Image.fromarray(np.asarray(PORTRAIT.convert("L")).astype(np.uint16) * 257)


SAVED = {
    "jpeg": lambda image, **options: saved(image, "JPEG", quality=95, **options),
    "png": lambda image, **options: saved(image, "PNG", **options),
    "webp": lambda image, **options: saved(image, "WEBP", quality=95, **options),
    "heic": lambda image, **options: heif_file(image, quality=95, **options),
    "avif": lambda image, **options: heif_file(image, "AVIF", quality=95, speed=10, **options),
    "jpeg2000": lambda image, **options: jpeg2000_file(image, quality_mode="rates", quality_layers=[8], **options),
}  # fmt: skip
VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0" + bytes(range(256)) * 64 + b"\xff\xda" * 120


def _variants() -> dict[str, tuple[bytes, float]]:
    """Files of the portrait, and how alike their templates must be to the plain one's."""
    found: dict[str, tuple[bytes, float]] = {}
    for kind, save in SAVED.items():
        found[kind] = save(PORTRAIT), SAME
        found[f"{kind}, bytes behind"] = save(PORTRAIT) + VIDEO, SAME
        found[f"{kind}, grey"] = save(PORTRAIT.convert("L")), SAME_CONVERTED
        found[f"{kind}, twice as large"] = save(PORTRAIT.resize((512, 512), Image.Resampling.LANCZOS)), SAME_CONVERTED
        if kind != "jpeg":
            found[f"{kind}, transparent"] = save(_see_through(0)), SAME
        if kind != "jpeg2000":
            found[f"{kind}, a profile"] = save(PORTRAIT, icc_profile=_profile()), SAME
            found[f"{kind}, a broken profile"] = save(PORTRAIT, icc_profile=_profile(is_broken=True)), SAME
    for kind in ("jpeg", "png", "webp", "avif"):
        for orientation, stored in STORED.items():
            turned = PORTRAIT if stored is None else PORTRAIT.transpose(stored)
            found[f"{kind}, orientation {orientation}"] = SAVED[kind](turned, exif=_exif(orientation)), SAME
    jpeg = SAVED["jpeg"]
    found |= {
        "jpeg, progressive": (jpeg(PORTRAIT, progressive=True), SAME),
        "jpeg, 4:4:4": (jpeg(PORTRAIT, subsampling=0), SAME),
        "jpeg, restart markers": (jpeg(PORTRAIT, restart_marker_rows=1), SAME),
        "jpeg, CMYK": (jpeg(PORTRAIT.convert("CMYK")), SAME_CONVERTED),
        "jpeg, no end marker": (jpeg(PORTRAIT)[:-2], SAME),
        "jpeg, no end marker and a video": (jpeg(PORTRAIT)[:-2] + b"MotionPhoto_Data" + VIDEO, SAME),
        "jpeg, a gain map as a second picture": (jpeg(PORTRAIT) + jpeg(PORTRAIT.convert("L").resize((64, 64))), SAME),
        "jpeg, several pictures (MPO)": (saved(PORTRAIT, "MPO", save_all=True, append_images=[PORTRAIT.rotate(180)]), SAME),
        "png, 16 bits": (_sixteen_bits(), SAME),
        "png, 16 bits of grey": (saved(_grey16(), "PNG"), SAME_CONVERTED),
        "png, a palette": (saved(PORTRAIT.quantize(256), "PNG"), SAME_CONVERTED),
        "webp, lossless": (saved(PORTRAIT, "WEBP", lossless=True), SAME),
        "webp, one frame in an animation's box": (_one_frame(), SAME),
        "heic, tiles": (SAVED["heic"](PORTRAIT, tile_size=64), SAME),
        "heic, several pictures": (SAVED["heic"](PORTRAIT, save_all=True, append_images=[PORTRAIT.rotate(180)] * 2), SAME),
        "heic, with a preview": (SAVED["heic"](PORTRAIT, thumbnails=[64]), SAME),
        "heic, 10 bits": (_heic_of_ten_bits(), SAME),
        "jpeg2000, a codestream": (SAVED["jpeg2000"](PORTRAIT, no_jp2=True), SAME),
        "jpeg2000, tiles": (jpeg2000_file(PORTRAIT, tile_size=(100, 100)), SAME),
        "jpeg2000, lossless": (jpeg2000_file(PORTRAIT), SAME),
        "jpeg2000, not to be halved": (jpeg2000_file(PORTRAIT, num_resolutions=1), SAME),
        "jpeg2000, CMYK": (jpeg2000_file(PORTRAIT.convert("CMYK")), SAME_CONVERTED),
        "jpeg2000, 16 bits of grey": (jpeg2000_file(_grey16()), SAME_CONVERTED),
    }  # fmt: skip
    return found


def _one_frame() -> bytes:
    plain = saved(PORTRAIT, "WEBP", quality=95)
    size = PORTRAIT.size
    return picture_files.webp_file(
        picture_files.webp_canvas(*size, 0x02),
        picture_files.webp_chunk(b"ANIM", bytes(6)),
        picture_files.webp_frame(*size, plain[12:]),
    )


def _heic_of_ten_bits() -> bytes:
    import pillow_heif

    deep = np.asarray(PORTRAIT).astype(np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.encode("RGB;16", PORTRAIT.size, deep.tobytes(), buffer, quality=95)
    return buffer.getvalue()


VARIANTS = _variants()


@pytest.fixture(scope="module")
def plain(engine: FaceEngine, reader: PhotoReader) -> Embedding:
    return template(engine, reader, saved(PORTRAIT, "PNG"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_a_photo_gives_its_template_or_a_clear_refusal(
    engine: FaceEngine, reader: PhotoReader, plain: Embedding, name: str
) -> None:
    data, least = VARIANTS[name]
    assert float(template(engine, reader, data) @ plain) >= least


def test_h13_one_bit_of_depth_is_read_or_refused_with_a_reason(engine: FaceEngine, reader: PhotoReader) -> None:
    data = saved(PORTRAIT.convert("1"), "PNG")
    assert reader.decode(data).pixels.max() == 255
    with pytest.raises((LowQuality, NoFace)) as refusal:
        template(engine, reader, data)
    assert refusal.value.status == 422


REFUSED: dict[str, tuple[bytes, type[Problem]]] = {
    "an animation (AVIF)": (heif_file(PORTRAIT, "AVIF", save_all=True, append_images=[PORTRAIT]), AnimatedImage),
    "an animation (WebP)": (saved(PORTRAIT, "WEBP", save_all=True, append_images=[PORTRAIT.rotate(180)]), AnimatedImage),
    "an animation (PNG)": (saved(PORTRAIT, "PNG", save_all=True, append_images=[PORTRAIT.rotate(180)]), AnimatedImage),
    "TIFF": (saved(PORTRAIT, "TIFF"), UnsupportedMediaType),
    "GIF": (saved(PORTRAIT, "GIF"), UnsupportedMediaType),
    "a video": (VIDEO, UnsupportedMediaType),
} | {
    f"{kind} cut at {share:.0%}": (save(PORTRAIT)[: int(len(save(PORTRAIT)) * share)] + end, UndecodableImage)
    for kind, save in SAVED.items()
    for share in (0.5, 0.9, 0.99)
    for end in ((b"", b"\xff\xd9") if kind in ("jpeg", "jpeg2000") else (b"",))
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_h04_h14_h15_a_refusal_names_its_reason(reader: PhotoReader, name: str) -> None:
    data, problem = REFUSED[name]
    with pytest.raises(problem) as refusal:
        reader.decode(data)
    assert refusal.value.errors[0].message


#: For each pair of files of the cases, what a comparison must answer: the same person, or not.
PAIRS = {
    **{(f"upside-down/{letter}.jpg", f"upside-down/{letter}_turned.jpg"): True for letter in "abcd"},
    ("upside-down/e_turned.jpg", "upside-down/f_turned.jpg"): False,
    ("bytes-after-the-picture/still.jpg", "bytes-after-the-picture/motion_photo.jpg"): True,
    ("small-face-in-a-large-photo/3198.webp", "small-face-in-a-large-photo/3200.webp"): True,
    ("png-side-chunks/plain.png", "png-side-chunks/colour_profile_2mb.png"): True,
    ("png-side-chunks/plain.png", "png-side-chunks/xmp_2mb.png"): True,
    ("orientation/upright.jpg", "orientation/six_as_long_big_endian.jpg"): True,
    ("orientation/upright.jpg", "orientation/two_blocks_first_says_six.jpg"): True,
    ("orientation/upright.jpg", "orientation/two_blocks_first_says_one.jpg"): True,
    ("orientation/upright.jpg", "orientation/six_in_a_raw_profile.png"): True,
    ("no-end-marker/whole.jpg", "no-end-marker/no_eoi.jpg"): True,
    ("no-end-marker/whole.jpg", "no-end-marker/no_eoi_then_video.jpg"): True,
    ("card-with-a-second-portrait/selfie.jpg", "card-with-a-second-portrait/card.jpg"): True,
    ("orientation/upright.jpg", "other-formats/iphone.heic"): True,
    ("orientation/upright.jpg", "other-formats/android.avif"): True,
    ("orientation/upright.jpg", "other-formats/passport_chip.jp2"): True,
}
#: Pairs of the same pixels: their score is at least 0.999.
SAME_PIXELS = ("bytes-after-the-picture", "png-side-chunks", "no-end-marker")
NEEDS_CASES = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the repository")


@NEEDS_CASES
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_pair_of_the_cases_gets_its_right_answer(
    engine: FaceEngine, reader: PhotoReader, one: str, other: str
) -> None:
    first, second = ((CASES / name).read_bytes() for name in (one, other))
    try:
        a = template(engine, reader, first)
    except NoFace:
        # dlib finds no face of 75 pixels: then it finds none on either.
        with pytest.raises(NoFace):
            template(engine, reader, second)
        return
    score = float(a @ template(engine, reader, second))
    assert (score >= threshold_at_fmr(engine.card, POLICY.verify_fmr)) == PAIRS[one, other], score
    if one.startswith(SAME_PIXELS):
        assert score >= 0.999


@NEEDS_CASES
def test_the_other_pictures_of_the_cases_get_their_right_answers(engine: FaceEngine, reader: PhotoReader) -> None:
    negative = (CASES / "negative/negative.jpg").read_bytes()
    with pytest.raises((LowQuality, NoFace)):
        template(engine, reader, negative)
    assert reader.decode((CASES / "webp-of-one-frame/one_frame.webp").read_bytes()).format == "webp"
    upright = reader.decode((CASES / "orientation/upright.jpg").read_bytes())
    for name in ("six_as_long_big_endian.jpg", "two_blocks_first_says_six.jpg", "two_blocks_first_says_one.jpg"):
        turned = reader.decode((CASES / "orientation" / name).read_bytes())
        assert (turned.width, turned.height) == (upright.width, upright.height)
    png = reader.decode((CASES / "orientation/six_in_a_raw_profile.png").read_bytes())
    assert (png.width, png.height) == (140, 118)


@NEEDS_CASES
@pytest.mark.parametrize("name", ["iphone.heic", "android.avif", "passport_chip.jp2"])
def test_a_format_of_the_cases_that_a_setting_leaves_out_is_named(reader: PhotoReader, name: str) -> None:
    only = replace(reader, formats=frozenset({"jpeg", "png", "webp"}))
    with pytest.raises(
        UnsupportedMediaType, match=r"Accepted are JPEG, PNG and WebP\. It is a .*(HEIC|AVIF|JPEG 2000)"
    ):
        only.decode((CASES / "other-formats" / name).read_bytes())


@NEEDS_CASES
def test_every_picture_of_the_cases_has_its_right_answer_here() -> None:
    named = {name for pair in PAIRS for name in pair} | {
        "negative/negative.jpg",
        "negative/upright.jpg",
        "webp-of-one-frame/one_frame.webp",
    }
    pictures = {".jpg", ".png", ".webp", ".heic", ".avif", ".jp2"}
    assert named == {str(path.relative_to(CASES)) for path in CASES.rglob("*") if path.suffix in pictures}

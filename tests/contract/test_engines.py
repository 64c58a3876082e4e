"""One suite over every face engine whose weights are here; dlib's come with the dependencies and always are."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.config import Settings
from app.domain.faces import Embedding, Pixels
from app.domain.photo import Photo, PhotoReader
from app.domain.policy import GalleryPolicy
from app.domain.quality import judge, measure
from app.domain.thresholds import threshold_at_fmr
from app.engine.detectors import shrunk
from app.engine.dlib_engine import DlibEngine
from app.engine.opening import open_engine
from app.engine.port import FaceEngine
from app.engine.reading import subject_of
from app.errors import LowQuality, ModelUnavailable, MultipleFaces
from tests.support.packs import BUFFALO, MOBILEFACENET, YUNET, weights_dir, write_manifest
from tests.support.photos import ASTRONAUT, GROUP, HANKS, encoded, pixels_of

READER = PhotoReader()

WEIGHTS = weights_dir()


def kinds_here() -> list[str]:
    kinds = ["dlib"]
    if WEIGHTS is not None and (WEIGHTS / BUFFALO).is_dir():
        kinds.append("insightface")
    if WEIGHTS is not None and (WEIGHTS / YUNET).is_file() and (WEIGHTS / MOBILEFACENET).is_file():
        kinds.append("opencv")
    return kinds


def settings_for(kind: str, folder: Path) -> Settings:
    if WEIGHTS is not None and (WEIGHTS / "liveness").is_dir():
        (folder / "liveness").symlink_to(WEIGHTS / "liveness")
    if kind == "insightface" and WEIGHTS is not None:
        (folder / "buffalo_sc").symlink_to(WEIGHTS / BUFFALO)
        return Settings(face_model="buffalo_sc", model_dir=folder)
    if kind == "opencv" and WEIGHTS is not None:
        write_manifest(folder / "yunet_mobilefacenet", WEIGHTS / YUNET, WEIGHTS / MOBILEFACENET)
        return Settings(face_model="yunet_mobilefacenet", model_dir=folder)
    return Settings(face_model="dlib", model_dir=folder, compute_threads=2)


@pytest.fixture(scope="module", params=kinds_here())
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaceEngine]:
    opened = open_engine(settings_for(request.param, tmp_path_factory.mktemp("models")), device="cpu").engine
    opened.warm()
    yield opened
    opened.close()


def embedding(engine: FaceEngine, pixels: Pixels) -> Embedding:
    return engine.embed(pixels, engine.detect(pixels)[0])[0]


def verifies(engine: FaceEngine, one: Embedding, other: Embedding) -> bool:
    return float(one @ other) >= threshold_at_fmr(engine.card, engine.card.verify_fmr)


def test_the_six_people_of_a_group_photo_are_found_largest_first(engine: FaceEngine) -> None:
    faces = engine.detect(pixels_of(GROUP))
    assert 3 <= len(faces) <= 6  # dlib's detector knows only faces that look ahead
    assert [face.area for face in faces] == sorted((face.area for face in faces), reverse=True)


def with_a_second_face(share: float, ratio: float) -> Pixels:
    """A scene of 1,200 pixels: a face has this share of its height, and a second face `ratio` of that."""
    scene, head, face_height = np.full((1200, 1200, 3), 150, np.uint8), pixels_of(ASTRONAUT)[20:210, 140:310], 116
    for height, at in ((share * 1200, 350), (share * ratio * 1200, 20)):
        size = round(170 * height / face_height), round(190 * height / face_height)
        scene[at : at + size[1], at : at + size[0]] = cv2.resize(head, size, interpolation=cv2.INTER_LINEAR)
    return scene


@pytest.mark.parametrize(("share", "ratio"), [(0.22, 0.35), (0.3, 0.3), (0.4, 0.35)])
def test_a_gallery_for_single_faces_sees_a_small_second_face(engine: FaceEngine, share: float, ratio: float) -> None:
    pixels = with_a_second_face(share, ratio)
    usual, thorough = engine.detect(pixels), engine.detect(pixels, search="thorough")
    assert len(thorough) == 2
    assert thorough[0].box == usual[0].box, "the subject's template stays the same"
    photo = Photo(pixels, "png", 1200, 1200, 1)
    with pytest.raises(MultipleFaces):
        subject_of(engine, photo, GalleryPolicy(faces="single"))
    assert subject_of(engine, photo, GalleryPolicy()).main.face.box == usual[0].box


def test_landmarks_lie_in_the_box_left_eye_first_and_mouth_below(engine: FaceEngine) -> None:
    for file in (ASTRONAUT, HANKS):
        pixels = pixels_of(file)
        face = engine.detect(pixels)[0]
        assert face.landmarks.shape == (5, 2)
        assert face.landmarks.dtype == np.float32
        left, right, nose, mouth_left, mouth_right = face.landmarks
        assert left[0] < right[0]
        assert mouth_left[0] < mouth_right[0]
        assert left[1] < nose[1] < mouth_left[1]
        x, y, width, height = face.box
        slack = 0.15 * height
        assert (face.landmarks[:, 0] > x - slack).all()
        assert (face.landmarks[:, 0] < x + width + slack).all()
        assert (face.landmarks[:, 1] > y - slack).all()
        assert (face.landmarks[:, 1] < y + height + slack).all()
        assert 0 < face.detection_score <= 1


def test_embeddings_are_unit_vectors_of_the_cards_dimension(engine: FaceEngine) -> None:
    pixels = pixels_of(ASTRONAUT)
    vector, length = engine.embed(pixels, engine.detect(pixels)[0])
    assert vector.shape == (engine.card.dimension,)
    assert vector.dtype == np.float32
    assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-5)
    assert engine.card.usual_length is not None
    assert engine.card.usual_length[0] * 0.8 < length < engine.card.usual_length[2] * 1.2


def test_the_same_person_verifies_after_relighting_scaling_and_re_encoding(engine: FaceEngine) -> None:
    for file in (ASTRONAUT, HANKS):
        first = pixels_of(file)
        lit = np.clip(first.astype(np.float32) * 0.75 + 10, 0, 255).astype(np.uint8)
        scaled = np.asarray(cv2.resize(lit, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        second = READER.decode(encoded(scaled, "JPEG", quality=70)).pixels
        assert verifies(engine, embedding(engine, first), embedding(engine, second))


def test_two_people_do_not_verify(engine: FaceEngine) -> None:
    assert not verifies(engine, embedding(engine, pixels_of(ASTRONAUT)), embedding(engine, pixels_of(HANKS)))


def test_an_embedding_does_not_depend_on_what_else_is_being_embedded(engine: FaceEngine) -> None:
    pixels = pixels_of(GROUP)
    faces = engine.detect(pixels)
    alone = [engine.embed(pixels, face)[0] for face in faces]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda face: engine.embed(pixels, face)[0], faces * 3))
    for index, vector in enumerate(together):
        assert np.array_equal(vector, alone[index % len(faces)])


def test_h10_all_eight_orientations_give_the_same_template(engine: FaceEngine) -> None:
    upright = pixels_of(ASTRONAUT)
    expected = embedding(engine, upright)
    lying = {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, 3)}
    mirrored = {
        2: upright[:, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
    }
    for orientation, pixels in (lying | mirrored).items():
        data = encoded(
            np.ascontiguousarray(pixels),
            "PNG",
            exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0, 0, 0, 0, 0]),
        )
        found = embedding(engine, READER.decode(data).pixels)
        assert float(found @ expected) >= 0.98


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_photo_on_its_side_or_head_is_turned_upright(engine: FaceEngine, turns: int) -> None:
    upright = pixels_of(ASTRONAUT)
    lying = np.ascontiguousarray(np.rot90(upright, turns))
    found = subject_of(engine, READER.decode(encoded(lying, "PNG")), GalleryPolicy())
    assert np.array_equal(found.photo.pixels, upright), "the stored photo is upright"
    assert np.array_equal(found.vector[0], embedding(engine, upright)), "and gives the same template"


def test_an_empty_room_holds_no_face(engine: FaceEngine) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    assert engine.detect(noise) == []
    assert engine.detect(np.full((480, 360, 3), 255, dtype=np.uint8)) == []


def test_a_close_up_is_found(engine: FaceEngine) -> None:
    pixels = pixels_of(ASTRONAUT)
    x, y, width, height = engine.detect(pixels)[0].box
    tight = pixels[max(0, int(y - 0.1 * height)) : int(y + 1.1 * height), int(x - 0.15 * width) : int(x + 1.15 * width)]
    large = np.asarray(cv2.resize(tight, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    assert max(engine.detect(large)[0].box[2:]) > 0.6 * max(large.shape[:2])


def test_the_smallest_photo_that_is_let_in_does_no_harm(engine: FaceEngine) -> None:
    assert engine.detect(np.zeros((40, 40, 3), dtype=np.uint8)) == []
    assert engine.detect(np.zeros((40, 160, 3), dtype=np.uint8)) == []


def test_h26_a_good_photo_is_good_enough_and_a_blurred_one_is_not(engine: FaceEngine) -> None:
    pixels = pixels_of(ASTRONAUT)
    face = engine.detect(pixels)[0]
    usual = engine.card.usual_length
    good = measure(pixels, face, engine.embed(pixels, face)[1], usual_length=usual)
    assert judge(good, "standard") == ()
    blurred = np.asarray(cv2.GaussianBlur(pixels, (0, 0), 6), dtype=np.uint8)
    poor = measure(blurred, face, engine.embed(blurred, face)[1], usual_length=usual)
    assert judge(poor, "standard") != ()
    assert poor.score < good.score


def test_liveness_answers_where_its_models_are(engine: FaceEngine) -> None:
    pixels = pixels_of(ASTRONAUT)
    score = engine.liveness(pixels, engine.detect(pixels)[0])
    assert (score is not None) == engine.has_liveness
    assert score is None or 0 <= score <= 1


def test_the_card_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    for kind in kinds_here():
        folder = tmp_path / kind
        folder.mkdir()
        opened = open_engine(settings_for(kind, folder), device="cpu")
        assert opened.engine.card.contract.startswith("sha256:")
        assert opened.engine.card.kind == kind
        assert opened.reason
        opened.engine.close()


def test_h26_a_face_whose_landmarks_fall_together_is_refused_and_never_embedded(engine: FaceEngine) -> None:
    if isinstance(engine, DlibEngine):
        return  # finds its own landmarks inside the box
    pixels = pixels_of(ASTRONAUT)
    face = engine.detect(pixels)[0]
    broken = type(face)(face.box, np.zeros((5, 2), dtype=np.float32), 1.0)
    with pytest.raises(LowQuality):
        engine.embed(pixels, broken)


@pytest.mark.parametrize("weights", [WEIGHTS] if WEIGHTS is not None and "insightface" in kinds_here() else [])
def test_what_insightface_itself_computes_is_what_we_compute(tmp_path: Path, weights: Path) -> None:
    engine = open_engine(settings_for("insightface", tmp_path), device="cpu").engine
    # If a photo is no finer than the crop, both read the same pixels. Idem averages a finer photo first.
    pixels = shrunk(pixels_of(ASTRONAUT), 400)[0]
    face = engine.detect(pixels)[0]
    recogniser = next((weights / BUFFALO).glob("w600k*.onnx"))
    # Its class, on its own crop: only the fit of the landmarks is done by its formula with a newer call.
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.utils.face_align import arcface_dst
    from skimage.transform import SimilarityTransform

    matrix = SimilarityTransform.from_estimate(face.landmarks, arcface_dst).params[:2]
    crop = cv2.warpAffine(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), matrix, (112, 112), borderValue=0.0)
    theirs = ArcFaceONNX(model_file=str(recogniser)).get_feat(crop).ravel()
    ours, length = engine.embed(pixels, face)
    assert float(theirs @ ours / np.linalg.norm(theirs)) > 0.9999
    assert length == pytest.approx(float(np.linalg.norm(theirs)), rel=1e-3)
    engine.close()


def test_a_dead_child_of_dlib_is_replaced(tmp_path: Path) -> None:
    engine = open_engine(settings_for("dlib", tmp_path)).engine
    assert isinstance(engine, DlibEngine)
    engine.warm()
    (child,) = engine.process_ids
    os.kill(child, signal.SIGKILL)
    assert len(engine.detect(pixels_of(ASTRONAUT))) == 1
    assert engine.process_ids != (child,)
    engine.close()
    assert engine.process_ids == ()


def test_dlib_works_on_as_many_photos_as_it_has_children(tmp_path: Path) -> None:
    engine = open_engine(settings_for("dlib", tmp_path)).engine
    assert isinstance(engine, DlibEngine)
    assert engine.process_ids == ()
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(engine.detect, [pixels_of(ASTRONAUT)] * 6))
    assert [len(faces) for faces in found] == [1] * 6
    assert 1 <= len(engine.process_ids) <= 2
    engine.close()


def test_a_closed_dlib_refuses_and_leaves_no_child(tmp_path: Path) -> None:
    engine = open_engine(settings_for("dlib", tmp_path)).engine
    assert isinstance(engine, DlibEngine)
    engine.warm()
    (child,) = engine.process_ids
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(ModelUnavailable):
        engine.detect(pixels_of(ASTRONAUT))

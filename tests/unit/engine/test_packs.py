"""Packs: told apart by what they hold, refused with the reason."""

import shutil
from pathlib import Path

import pytest

from app.config import Settings
from app.engine.liveness import find_liveness
from app.engine.opening import open_engine
from app.engine.packs import DLIB, FoundPack, choose, discover, sha256_of
from app.engine.sessions import open_session
from app.errors import ModelUnavailable
from tests.support.packs import arcface_like, onnx_file, scrfd_like, write_manifest


def found(model_dir: Path, name: str) -> FoundPack:
    return next(entry for entry in discover(model_dir) if entry.name == name)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder such as InsightFace releases: detector, recogniser and other networks, under any names."""
    folder = tmp_path / "some_pack"
    scrfd_like(folder / "one.onnx")
    arcface_like(folder / "two.onnx")
    onnx_file(folder / "landmarks.onnx", ("n", 3, 192, 192), (1, 212))
    onnx_file(folder / "age.onnx", ("n", 3, 96, 96), (1, 3))
    return folder


def test_dlib_is_always_there_and_free_to_use(tmp_path: Path) -> None:
    (entry,) = discover(tmp_path / "missing")
    assert entry.name == DLIB
    assert entry.pack is not None
    assert entry.pack.card.commercial_use
    assert entry.pack.card.dimension == 128
    assert entry.pack.centring_mean is not None


def test_a_release_folder_is_told_by_its_graphs_not_by_names(tmp_path: Path, release: Path) -> None:
    pack = found(tmp_path, "some_pack").pack
    assert pack is not None
    assert pack.kind == "insightface"
    assert (pack.detector.path.name, pack.recogniser.path.name) == ("one.onnx", "two.onnx")
    assert pack.detection_sizes[0] == 320
    assert release.name == pack.name


def test_an_unknown_recogniser_gets_a_conservative_card_that_says_so(tmp_path: Path, release: Path) -> None:
    pack = found(tmp_path, release.name).pack
    assert pack is not None
    assert pack.card.source.startswith("generic")
    assert not pack.card.commercial_use
    assert pack.card.impostor_curve[0].threshold > 0.3


def test_a_detector_alone_is_no_pack(tmp_path: Path) -> None:
    scrfd_like(tmp_path / "half" / "det.onnx")
    assert found(tmp_path, "half").reason.startswith("it holds 1 face detectors and 0 recognisers")


def test_two_recognisers_need_a_manifest(tmp_path: Path, release: Path) -> None:
    arcface_like(release / "three.onnx", 256)
    assert "pack.toml may say which" in found(tmp_path, release.name).reason


def test_h94_a_file_under_a_published_name_with_other_bytes_is_refused_with_both_digests(
    tmp_path: Path, release: Path
) -> None:
    file = (release / "two.onnx").rename(release / "w600k_mbf.onnx")
    with pytest.raises(ModelUnavailable) as refusal:
        choose(release.name, tmp_path)
    assert "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f" in refusal.value.detail
    assert sha256_of(file) in refusal.value.detail


def test_a_manifest_says_what_the_graphs_cannot(tmp_path: Path) -> None:
    detector, recogniser = (
        onnx_file(tmp_path / "x/d.onnx", (1, 3, 640, 640), (1, 1)),
        arcface_like(tmp_path / "x/r.onnx", 128),
    )
    write_manifest(tmp_path / "mine", detector, recogniser)
    pack, reason = choose("mine", tmp_path)
    assert pack.kind == "opencv"
    assert pack.preprocessing.mean == (123.675, 116.28, 103.53)
    assert "by name" in reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"recogniser_sha256": '"' + "0" * 64 + '"'}, "expected SHA-256 0000"),
        ({"recogniser_sha256": '"short"'}, "recogniser.sha256"),
        ({"detector_kind": '"magic"'}, "detector.kind"),
        ({"dimension": '"many"'}, "recogniser.dimension"),
        ({"mean": "nonsense"}, "not TOML"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    detector, recogniser = scrfd_like(tmp_path / "x/d.onnx"), arcface_like(tmp_path / "x/r.onnx", 128)
    write_manifest(tmp_path / "mine", detector, recogniser, **changed)
    with pytest.raises(ModelUnavailable, match="mine") as refusal:
        choose("mine", tmp_path)
    assert words in refusal.value.detail


def test_h94_a_missing_pack_is_refused_and_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="idem models"):
        choose("buffalo_l", tmp_path)


def test_auto_takes_insightface_then_opencv_then_dlib_and_says_why(tmp_path: Path, release: Path) -> None:
    scrfd_like(tmp_path / "half" / "det.onnx")
    detector, recogniser = (
        onnx_file(tmp_path / "x/d.onnx", (1, 3, 640, 640), (1, 1)),
        arcface_like(tmp_path / "x/r.onnx", 128),
    )
    write_manifest(tmp_path / "mine", detector, recogniser)
    pack, reason = choose("auto", tmp_path)
    assert pack.name == release.name
    assert "InsightFace" in reason
    assert "half: it holds" in reason
    shutil.rmtree(release)
    assert choose("auto", tmp_path)[0].name == "mine"
    shutil.rmtree(tmp_path / "mine")
    assert choose("auto", tmp_path)[0].name == DLIB


def test_the_contract_is_of_what_makes_the_vectors_and_of_nothing_else(tmp_path: Path, release: Path) -> None:
    first = found(tmp_path, release.name).pack
    renamed = release.rename(tmp_path / "other_name")
    (renamed / "one.onnx").rename(renamed / "uno.onnx")
    second = found(tmp_path, "other_name").pack
    assert first is not None
    assert second is not None
    assert first.card.contract == second.card.contract
    arcface_like(renamed / "two.onnx", 256)
    third = found(tmp_path, "other_name").pack
    assert third is not None
    assert third.card.contract != first.card.contract


def test_another_preprocessing_is_another_contract(tmp_path: Path) -> None:
    detector, recogniser = scrfd_like(tmp_path / "x/d.onnx"), arcface_like(tmp_path / "x/r.onnx", 128)
    write_manifest(tmp_path / "one", detector, recogniser)
    write_manifest(tmp_path / "two", detector, recogniser, mean="[127.5, 127.5, 127.5]")
    assert choose("one", tmp_path)[0].card.contract != choose("two", tmp_path)[0].card.contract


def test_a_network_that_normalises_by_itself_gets_plain_pixels(tmp_path: Path, release: Path) -> None:
    import onnx

    model = onnx.load(str(release / "two.onnx"))
    model.graph.node[0].name = "_minusscalar0"
    model.graph.node.append(onnx.helper.make_node("Identity", ["in"], ["spare"], name="_mulscalar0"))
    onnx.save(model, str(release / "two.onnx"))
    pack = found(tmp_path, release.name).pack
    assert pack is not None
    assert pack.preprocessing.mean == (0, 0, 0)
    assert pack.preprocessing.scale == (1, 1, 1)


def test_h94_weights_that_change_after_they_were_chosen_are_not_loaded(tmp_path: Path, release: Path) -> None:
    engine = open_engine(Settings(face_model=release.name, model_dir=tmp_path), device="cpu").engine
    (release / "two.onnx").write_bytes(b"something else")
    with pytest.raises(ModelUnavailable, match="expected SHA-256"):
        engine.warm()


def test_h95_a_graphics_card_that_was_asked_for_is_never_silently_replaced() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    with pytest.raises(ModelUnavailable, match="CUDA was asked for"):
        open_session(b"", device="cuda", what="a model")


def test_liveness_needs_both_of_its_models(tmp_path: Path) -> None:
    assert find_liveness(tmp_path) == ()
    onnx_file(tmp_path / "liveness" / "2.7_80x80_MiniFASNetV2.onnx", (1, 3, 80, 80), (1, 3))
    assert find_liveness(tmp_path) == ()

"""Packs for tests: what the model directory holds, and small ONNX files made up on the spot."""

import os
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from app.engine.packs import MANIFEST, sha256_of

REPOSITORY = Path(__file__).parents[2]

YUNET = Path("opencv_zoo/face_detection_yunet_2023mar.onnx")
MOBILEFACENET = Path("extra/MobileFaceNet_foamliu.onnx")
BUFFALO = Path("buffalo_sc")


def weights_dir() -> Path | None:
    """The folder of real weights: MODEL_DIR, else the models beside the repository; None where there is none."""
    named, beside = os.environ.get("MODEL_DIR"), REPOSITORY.parent / "shared" / "models"
    folder = Path(named) if named else beside
    return folder.resolve() if folder.is_dir() else None


def write_manifest(folder: Path, detector: Path, recogniser: Path, **changed: str) -> Path:
    """A manifest for YuNet with the MobileFaceNet of foamliu; `changed` replaces a line's value as TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "detector_sha256": f'"{sha256_of(detector)}"',
        "recogniser_sha256": f'"{sha256_of(recogniser)}"',
        "dimension": "128",
        "detector_kind": '"yunet"',
        "mean": "[123.675, 116.28, 103.53]",
        **changed,
    }
    text = f"""\
kind = "opencv"

[detector]
kind = {values["detector_kind"]}
file = "{detector}"
sha256 = {values["detector_sha256"]}

[recogniser]
file = "{recogniser}"
sha256 = {values["recogniser_sha256"]}
dimension = {values["dimension"]}
mean = {values["mean"]}
scale = [0.0171247538, 0.0175070028, 0.0174291939]
"""
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder


def onnx_file(file: Path, inputs: tuple[int | str, ...], *outputs: tuple[int | str, ...]) -> Path:
    """A tiny ONNX model with this outside, which does nothing useful."""
    source = helper.make_tensor_value_info("in", TensorProto.FLOAT, inputs)
    sinks = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(outputs)]
    nodes = [helper.make_node("Identity", ["in"], [sink.name], name=f"Identity_{i}") for i, sink in enumerate(sinks)]
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(helper.make_graph(nodes, "made-up", [source], sinks)), str(file))
    return file


def scrfd_like(file: Path) -> Path:
    """A graph that looks like SCRFD with landmarks."""
    shapes = [(f"n{i}", width) for i, width in enumerate((1, 1, 1, 4, 4, 4, 10, 10, 10))]
    return onnx_file(file, (1, 3, "h", "w"), *shapes)


def arcface_like(file: Path, dimension: int = 512) -> Path:
    """A graph that looks like an ArcFace recogniser."""
    return onnx_file(file, ("n", 3, 112, 112), ("n", dimension))

"""PRelu nodes become Mul and Max, and the network gives the same numbers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.engine.activations import with_quick_prelu
from tests.support.packs import weights_dir

SIDE, CHANNELS = 6, 4


def network(slopes: npt.NDArray[np.float32], operators: int = 11) -> bytes:
    """PRelu of one input (1, CHANNELS, SIDE, SIDE)."""
    shape = (1, CHANNELS, SIDE, SIDE)
    source, sink = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y"))
    node = helper.make_node("PRelu", ["x", "slope"], ["y"], name="act")
    graph = helper.make_graph([node], "g", [source], [sink], [numpy_helper.from_array(slopes, "slope")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", operators)], ir_version=8)
    return bytes(model.SerializeToString())


def kinds(weights: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(weights).graph.node]


def outputs(weights: bytes, inputs: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
    return [np.asarray(one) for one in session.run(None, {session.get_inputs()[0].name: inputs})]


def test_the_numbers_are_the_same_for_slopes_up_to_one_and_below_zero() -> None:
    slopes = np.array([-0.8, 0.0, 0.25, 1.0], dtype=np.float32).reshape(CHANNELS, 1, 1)
    weights = network(slopes)
    quick = with_quick_prelu(weights)
    assert kinds(quick) == ["Mul", "Max"]
    inputs = np.random.default_rng(1).normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    inputs[0, :, 0, 0] = 0
    (before,), (after,) = outputs(weights, inputs), outputs(quick, inputs)
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("slope", "operators"), [(1.01, 11), (float("nan"), 11), (0.5, 7)], ids=["over-one", "nan", "old-operators"]
)
def test_a_prelu_that_would_change_stays(slope: float, operators: int) -> None:
    slopes = np.full((CHANNELS, 1, 1), 0.5, dtype=np.float32)
    slopes[2] = slope
    weights = network(slopes, operators)
    assert with_quick_prelu(weights) is weights


@pytest.mark.parametrize("data", [b"not a model", b"\xff" * 64])
def test_bytes_that_are_no_model_come_back(data: bytes) -> None:
    assert with_quick_prelu(data) is data


@pytest.mark.parametrize("name", ["buffalo_sc/w600k_mbf*.onnx", "liveness/*.onnx"])
def test_real_networks_give_the_same_numbers(name: str) -> None:
    rng = np.random.default_rng(2)
    for file in sorted((weights_dir() or Path("nowhere")).glob(name)):
        weights = file.read_bytes()
        quick = with_quick_prelu(weights)
        assert "PRelu" in kinds(weights)
        assert "PRelu" not in kinds(quick)
        side = 80 if "liveness" in name else 112
        inputs = rng.normal(size=(1, 3, side, side)).astype(np.float32)
        for before, after in zip(outputs(weights, inputs), outputs(quick, inputs), strict=True):
            assert np.array_equal(before, after), file.name

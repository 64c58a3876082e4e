"""Reading what an ONNX file takes and gives, from its bytes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from app.engine.graphs import NotOnnx, read_graph
from tests.support.packs import onnx_file, weights_dir


def test_names_and_shapes_are_read_with_open_dimensions_as_zero(tmp_path: Path) -> None:
    graph = read_graph(onnx_file(tmp_path / "a.onnx", ("n", 3, 112, 112), ("n", 512)))
    assert [(tensor.name, tensor.shape) for tensor in graph.inputs] == [("in", (0, 3, 112, 112))]
    assert [(tensor.name, tensor.shape) for tensor in graph.outputs] == [("out0", (0, 512))]
    assert graph.first_nodes == ("Identity_0",)


def test_weights_that_an_old_export_lists_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 4))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))
    values = numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="Mul_0")
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", [shape, weight], [out], [values])), str(tmp_path / "a.onnx")
    )
    assert [tensor.name for tensor in read_graph(tmp_path / "a.onnx").inputs] == ["x"]


@pytest.mark.parametrize("data", [b"", b"not an onnx file at all", b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(NotOnnx):
        read_graph(tmp_path / "a.onnx")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_rubbish_never_ends_otherwise_than_as_refused_or_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    try:
        read_graph(tmp_path / "a.onnx")
    except NotOnnx:
        return


def test_h94_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole = onnx_file(tmp_path / "a.onnx", (1, 3, 8, 8), (1, 8)).read_bytes()
    (tmp_path / "a.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NotOnnx):
        read_graph(tmp_path / "a.onnx")


def test_real_models_are_read_as_the_onnx_package_reads_them() -> None:
    for file in sorted((weights_dir() or Path("nowhere")).glob("*/*.onnx")):
        theirs = onnx.load(str(file)).graph
        ours = read_graph(file)
        assert [tensor.name for tensor in ours.inputs] == [value.name for value in theirs.input]
        for tensor, value in zip(ours.outputs, theirs.output, strict=True):
            dimensions = value.type.tensor_type.shape.dim
            assert (tensor.name, tensor.shape) == (value.name, tuple(dimension.dim_value for dimension in dimensions))

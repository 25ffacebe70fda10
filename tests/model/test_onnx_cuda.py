"""What CUDA gets, made and inspected on a machine without a GPU."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pipeline import files
from pipeline.model.agreement import logits, onnx_logits, pytorch_logits
from pipeline.model.onnx_export import export_fused, export_half
from pipeline.model.onnx_quantize import quantize
from pipeline.quantize import CudaConfig
from tests.model.test_onnx_quantize import HEAD, ROWS, WEIGHTS, settings


@pytest.fixture(scope="module")
def tiny_cuda(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fused-fp16"
    folder.mkdir()
    export_fused(tiny_base, folder, "cuda")
    return folder


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def floats(graph: onnx.GraphProto) -> set[int]:
    kinds = {tensor.data_type for tensor in graph.initializer}
    return kinds & {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def test_fused_graph_has_float16_and_grouped_attention(tiny_cuda: Path, tiny_base: Path) -> None:
    graph = onnx.load(tiny_cuda / "model.onnx").graph
    assert operators(graph)["GroupQueryAttention"] == 2
    assert floats(graph) == {TensorProto.FLOAT16}
    kinds = {found.name: found.type.tensor_type.elem_type for found in [*graph.input, *graph.output]}
    assert {kind for name, kind in kinds.items() if "." in name} == {TensorProto.FLOAT16}  # past and present
    assert "Neg" not in operators(graph)  # the device's result would have to come back for Slice
    assert files.read_json(tiny_cuda / "toolcaller.json") == {"runtime": "cuda", "cuda_graph": False}
    for expected, found in zip(pytorch_logits(tiny_base, ROWS), onnx_logits(tiny_cuda, ROWS), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-3)


def test_weights_for_pytorch_are_float16(tiny_base: Path, tmp_path: Path) -> None:
    export_half(tiny_base, tmp_path)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, tiny_base)]
    assert sizes[0] < 0.6 * sizes[1]
    for expected, found in zip(pytorch_logits(tiny_base, ROWS), logits(tmp_path, ROWS), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-3)


@pytest.mark.parametrize(
    ("changed", "forms", "tolerance"),
    [
        ({"bits": 8}, {"8": WEIGHTS + HEAD}, 0.02),
        ({"bits": 4}, {"4": WEIGHTS + HEAD}, 0.3),
        ({"bits": 4, "algorithm": "gptq"}, {"4": WEIGHTS + HEAD}, 0.3),
    ],
)
def test_quantized_graph_is_weight_only_over_float16(
    tiny_cuda: Path, tmp_path: Path, changed: dict[str, object], forms: dict[str, int], tolerance: float
) -> None:
    cfg = settings(accuracy_level=0, **changed)
    counts, _ = quantize(tiny_cuda / "model.onnx", tmp_path / "model.onnx", cfg, [(row, 0) for row in ROWS])
    assert +counts == forms
    graph = onnx.load(tmp_path / "model.onnx").graph
    found = operators(graph)
    assert (found["MatMulNBits"], found["GroupQueryAttention"], found["GatherBlockQuantized"]) == (9, 2, 1)
    assert not found.keys() & {"MatMul", "DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"}
    assert floats(graph) == {TensorProto.FLOAT16}  # the scales too: they have the activations' type
    for expected, near in zip(onnx_logits(tiny_cuda, ROWS), onnx_logits(tmp_path, ROWS), strict=True):
        assert np.abs(near - expected).max() < tolerance * np.abs(expected).max()


def test_block_that_cuda_gathers_wrongly_is_refused(tiny_cuda: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block_size 128 does not divide the 64 channels of the embedding"):
        quantize(tiny_cuda / "model.onnx", tmp_path / "model.onnx", settings(block_size=128), [])


def test_dynamic_int8_is_refused_with_the_reason_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"quantize\.cuda\.int8\.dynamic must be false: .*no CUDA kernels.*#7745"):
        CudaConfig(int8=settings(dynamic=True), int4=settings(bits=4))

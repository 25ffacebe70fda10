"""The runtimes of the GPU give the logits of a plain pass; here on the CPU, with the graphs made for CUDA."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline import files
from pipeline.model.agreement import pytorch_logits
from pipeline.model.onnx_export import export_fused, export_half
from pipeline.runtime.caller import load_runtime
from pipeline.runtime.compiled import CompiledRuntime
from pipeline.runtime.cuda import CudaRuntime
from pipeline.runtime.generation import Runtime

PREFIX, OTHER = list(range(10, 30)), list(range(60, 95))
ASKED, WRONG, RIGHT = [1, 2, 3, 4, 5], [6, 7, 8], [9, 10]

Load = Callable[[int], Runtime]


@pytest.fixture(params=["any length", "fixed shapes", "compiled"])
def load(tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Load:
    """Of a runtime, by the number of prefixes it keeps."""
    if request.param == "compiled":
        export_half(tiny_base, tmp_path)
    else:
        export_fused(tiny_base, tmp_path, "cuda", cuda_graph=request.param == "fixed shapes")
    kind = CompiledRuntime if request.param == "compiled" else CudaRuntime

    def loaded(prefixes: int) -> Runtime:
        runtime = load_runtime(tmp_path, "cpu", 1, prefixes)
        assert type(runtime) is kind
        return runtime

    return loaded


@pytest.mark.parametrize("prefixes", [0, 1, 2])
def test_steps_give_the_logits_of_a_plain_pass(load: Load, prefixes: int, tiny_base: Path) -> None:
    runtime = load(prefixes)
    for prefix in (PREFIX, OTHER, OTHER, PREFIX):
        expected = pytorch_logits(tiny_base, [[*prefix, *ASKED, *RIGHT]])[0]
        at = len(prefix)
        runtime.begin(prefix)
        first = runtime.step([*ASKED, *WRONG], at, 1 + len(WRONG))
        assert first.shape == (4, expected.shape[1])
        assert first.dtype == np.float32
        np.testing.assert_allclose(first[0], expected[at + len(ASKED) - 1], atol=3e-3)
        for place, token in enumerate(RIGHT, start=at + len(ASKED)):  # over the wrong ones, one at a time
            np.testing.assert_allclose(runtime.step([token], place, 1)[0], expected[place], atol=3e-3)


def test_prefix_that_was_not_used_for_the_longest_is_dropped(load: Load) -> None:
    runtime = load(2)
    for prefix in (PREFIX, OTHER, PREFIX, ASKED):
        runtime.begin(prefix)
    assert [runtime.keeps(prefix) for prefix in (PREFIX, OTHER, ASKED)] == [True, False, True]


def test_models_without_cuda_kernels_are_refused_with_the_reason(tiny_fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GroupQueryAttention takes float16 only.*export\.device=cuda"):
        load_runtime(tiny_fused, "cuda", 1)
    dynamic = tmp_path / "int8"
    shutil.copytree(tiny_fused, dynamic)
    files.write_json(dynamic / "toolcaller.json", {"runtime": "fused", "quantize": {"dynamic": True}})
    with pytest.raises(ValueError, match="dynamic INT8 has no CUDA kernels"):
        load_runtime(dynamic, "cuda", 1)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="is for where none is")
def test_cuda_is_refused_where_there_is_none(tiny_base: Path, tmp_path: Path) -> None:
    export_fused(tiny_base, tmp_path, "cuda")
    with pytest.raises(RuntimeError, match="ONNX Runtime offers only"):
        load_runtime(tmp_path, "cuda", 1)

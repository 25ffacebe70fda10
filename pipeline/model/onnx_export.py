"""From a tuned model to ONNX graphs: optimum's portable one, onnxruntime-genai's fused one."""

import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx

from pipeline import files
from pipeline.model.base import load_tuned

PRECISIONS = {"cpu": "fp32", "cuda": "fp16"}  # of the fused graph
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")


def export_portable(tuned: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about Python control flow, checked by parity
        main_export(str(tuned), out, task="text-generation-with-past", do_validation=False, trust_remote_code=False)
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "portable"})


def export_fused(tuned: Path, out: Path, device: str = "cpu", cuda_graph: bool = False) -> None:
    """GroupQueryAttention, rotary embedding and SkipSimplifiedLayerNormalization in single operators.

    In float32 for the CPU. For CUDA in float16: GroupQueryAttention has no float32 kernel there. No GPU is needed to
    make it, and the CPU can run it. `cuda_graph`: a note for the runtime (runtime/cuda.py).
    """
    from onnxruntime_genai.models.builder import create_model

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        # The hub is out of it: the model is a folder, and code that lies in one is never run.
        local = {"hf_remote": False, "hf_token": "false"}
        create_model("", str(tuned), str(out), PRECISIONS[device], device, cache, **local)
    (out / "genai_config.json").unlink()
    if device == "cuda":
        _require_float16(out / "model.onnx")
    _keep_last(out / "model.onnx", "keep" if device == "cpu" else "start")
    copy_tokenizer(tuned, out)
    settings = {"runtime": "fused"} if device == "cpu" else {"runtime": "cuda", "cuda_graph": cuda_graph}
    files.write_json(out / "toolcaller.json", settings)


def export_half(tuned: Path, out: Path) -> None:
    """The weights in float16, for PyTorch with compiled steps (runtime/compiled.py)."""
    model, _ = load_tuned(tuned)
    model.half().save_pretrained(out)
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "compiled"})


def _require_float16(path: Path) -> None:
    """Raises RuntimeError where CUDA would have no kernel for the graph's attention."""
    graph = onnx.load(path, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    kinds = {tensor.data_type for tensor in graph.initializer}
    if "GroupQueryAttention" not in operators or onnx.TensorProto.FLOAT in kinds:
        raise RuntimeError(f"{path}: not GroupQueryAttention over float16, but {sorted(operators)}")


def _keep_last(path: Path, asked: str) -> None:
    """Give the graph an input (1,): how many of the last positions to compute logits for, or minus that as `start`.

    The head is a fifth of the arithmetic, and of a prompt only the last position is asked for. On CUDA it is `start`:
    Slice reads it on the CPU, so a Neg on the device would cost a copy at each step, and bar CUDA graphs
    (onnxruntime#16491).
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    head = next(node for node in graph.node if node.output[0] == "logits")
    graph.input.append(onnx.helper.make_tensor_value_info(asked, onnx.TensorProto.INT64, [1]))
    for name, value in (("keep.end", np.iinfo(np.int64).max), ("keep.axis", 1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    start = "keep.start" if asked == "keep" else asked
    cut = onnx.helper.make_node("Slice", [head.input[0], start, "keep.end", "keep.axis"], ["kept"])
    head.input[0] = "kept"
    at = list(graph.node).index(head)
    graph.node.insert(at, cut)
    if asked == "keep":
        graph.node.insert(at, onnx.helper.make_node("Neg", ["keep"], [start]))
    onnx.save(model, path)


def copy_tokenizer(source: Path, out: Path) -> None:
    """And config.json, which the runtimes read the length of the context from, and the tools where they are there."""
    for pattern in (*TOKENIZER_FILES, "config.json", "tools.json"):
        for path in source.glob(pattern):
            shutil.copy(path, out / path.name)

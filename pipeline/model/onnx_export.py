"""Export of the tuned model to ONNX: optimum's portable graph, onnxruntime-genai's fused one."""

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
        warnings.simplefilter("ignore")  # the tracer warns of Python control flow; `parity` checks the result
        main_export(str(tuned), out, task="text-generation-with-past", do_validation=False, trust_remote_code=False)
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "portable"})


def export_fused(tuned: Path, out: Path, device: str = "cpu", cuda_graph: bool = False) -> None:
    """A graph with GroupQueryAttention, rotary embedding and SkipSimplifiedLayerNormalization as single operators.

    It is in float32 for the CPU, in float16 for CUDA, where GroupQueryAttention has no float32 kernel. The export needs
    no GPU, and the CPU can run the float16 graph. `cuda_graph`: a setting for the runtime (runtime/cuda.py).
    """
    from onnxruntime_genai.models.builder import create_model

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        # Without the hub: the model is a folder, and code in it is never run.
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
    """Raises RuntimeError if CUDA has no kernel for the graph's attention."""
    graph = onnx.load(path, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    kinds = {tensor.data_type for tensor in graph.initializer}
    if "GroupQueryAttention" not in operators or onnx.TensorProto.FLOAT in kinds:
        raise RuntimeError(f"{path}: not GroupQueryAttention over float16, but {sorted(operators)}")


def _keep_last(path: Path, asked: str) -> None:
    """Add an input (1,): for how many last positions to compute logits (`keep`), or that number negated (`start`).

    The head is a fifth of the arithmetic, and a prompt needs logits at its last position only. CUDA gets `start`: Slice
    reads it on the CPU, so a Neg on the device would cost a copy per step and rule out CUDA graphs (onnxruntime#16491).
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
    """Also config.json, from which the runtimes read the context length, and tools.json if there is one."""
    for pattern in (*TOKENIZER_FILES, "config.json", "tools.json"):
        for path in source.glob(pattern):
            shutil.copy(path, out / path.name)

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

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")


def export_portable(tuned: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about Python control flow, checked by parity
        main_export(str(tuned), out, task="text-generation-with-past", do_validation=False, trust_remote_code=False)
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "portable"})


def export_fused(tuned: Path, out: Path, precision: str = "fp32", device: str = "cpu") -> None:
    """GroupQueryAttention, rotary embedding and SkipSimplifiedLayerNormalization in single operators."""
    from onnxruntime_genai.models.builder import create_model

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        # The hub is out of it: the model is a folder, and code that lies in one is never run.
        local = {"hf_remote": False, "hf_token": "false"}
        create_model("", str(tuned), str(out), precision, device, cache, **local)
    (out / "genai_config.json").unlink()
    _keep_last(out / "model.onnx")
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "fused"})


def _keep_last(path: Path) -> None:
    """Give the graph an input `keep` (1,): how many of the last positions to compute logits for.

    The head is a fifth of the arithmetic, and of a prompt only the last position is asked for.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    head = next(node for node in graph.node if node.output[0] == "logits")
    graph.input.append(onnx.helper.make_tensor_value_info("keep", onnx.TensorProto.INT64, [1]))
    for name, value in (("keep.end", np.iinfo(np.int64).max), ("keep.axis", 1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    negative = onnx.helper.make_node("Neg", ["keep"], ["keep.start"])
    cut = onnx.helper.make_node("Slice", [head.input[0], "keep.start", "keep.end", "keep.axis"], ["kept"])
    head.input[0] = "kept"
    at = list(graph.node).index(head)
    graph.node.insert(at, cut)
    graph.node.insert(at, negative)
    onnx.save(model, path)


def copy_tokenizer(source: Path, out: Path) -> None:
    """And config.json, which the runtimes read the length of the context from."""
    for pattern in (*TOKENIZER_FILES, "config.json"):
        for path in source.glob(pattern):
            shutil.copy(path, out / path.name)

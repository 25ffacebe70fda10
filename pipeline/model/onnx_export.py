"""From a tuned model to ONNX graphs: optimum's portable one, onnxruntime-genai's fused one."""

import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path

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
    copy_tokenizer(tuned, out)
    files.write_json(out / "toolcaller.json", {"runtime": "fused"})


def copy_tokenizer(source: Path, out: Path) -> None:
    """And config.json, which the runtimes read the length of the context from."""
    for pattern in (*TOKENIZER_FILES, "config.json"):
        for path in source.glob(pattern):
            shutil.copy(path, out / path.name)

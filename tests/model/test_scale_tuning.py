"""Scales that learn after rounding bring the rounded model nearer to the tuned one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline import files
from pipeline.model import base, scale_tuning
from pipeline.model.agreement import closeness
from pipeline.model.onnx_export import copy_tokenizer
from pipeline.model.onnx_quantize import quantize
from pipeline.quantize import VariantConfig
from pipeline.toolcall.conversation import Request

CFG = VariantConfig(4, "gptq", 32, True, 4, False, 0.0, 0, eight_bit_products=0, tuning_steps=1)


def test_tuned_scales_say_more_of_what_the_model_says(
    tiny_base: Path, tiny_fused: Path, tmp_path: Path, apples: list[Request]
) -> None:
    model, tokenizer = base.load_tuned(tiny_base)
    said: list[Any] = []

    def tune(rounded: Any) -> Any:
        said.append((rounded, scale_tuning.tune(model, rounded, apples[:30], tokenizer, 12)))
        return said[0][1]

    found = {}
    for name, tuner in (("plain", None), ("tuned", tune)):
        (tmp_path / name).mkdir()
        quantize(tiny_fused / "model.onnx", tmp_path / name / "model.onnx", CFG, [(list(range(60)), 0)], tune=tuner)
        copy_tokenizer(tiny_fused, tmp_path / name)
        files.write_json(tmp_path / name / "toolcaller.json", {"runtime": "fused"})
        found[name] = closeness(tiny_fused, tmp_path / name, apples[30:40])["kl_divergence"]
    assert found["tuned"] < 0.95 * found["plain"]
    rounded, scales = said[0]
    assert rounded.keys() - scales.keys() == {scale_tuning.HEAD}
    graph = onnx.load(tmp_path / "tuned" / "model.onnx").graph
    kept = next(t for t in graph.initializer if t.name == "model.layers.0.attn.qkv_proj.MatMul.weight_scales_fp16")
    assert np.allclose(
        numpy_helper.to_array(kept), scales["/model/layers.0/attn/qkv_proj/MatMul"].T.reshape(-1), rtol=1e-3
    )

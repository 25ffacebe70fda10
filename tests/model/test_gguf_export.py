from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import files
from pipeline.model.base import load_tuned
from pipeline.model.gguf_export import export_gguf, gguf_name


def test_the_file_holds_the_same_model(tiny_base: Path, tmp_path: Path) -> None:
    """transformers' own reader gives back equal weights, so equal logits."""
    export_gguf(tiny_base, tmp_path / "m.gguf", "F32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    model, _ = load_tuned(tiny_base)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_quantized_weights_are_near_and_small(tiny_base: Path, tmp_path: Path) -> None:
    export_gguf(tiny_base, tmp_path / "m.gguf", "Q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    found = tensors["blk.1.ffn_up.weight"]
    assert found.tensor_type == gguf.GGMLQuantizationType.Q8_0
    weight = load_tuned(tiny_base)[0].model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_allclose(gguf.quants.dequantize(found.data, found.tensor_type), weight, atol=2e-3)
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_other_architectures_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = files.read_json(tiny_base / "config.json") | {"model_type": "gpt2"}
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="of llama models only, not of 'gpt2'"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "F32")
    with pytest.raises(ValueError, match=r"no tensor .model\.layers\.0"):
        gguf_name("model.layers.0.self_attn.rotary.weight")

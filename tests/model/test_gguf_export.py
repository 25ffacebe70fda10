import shutil
from pathlib import Path
from typing import Any

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
    files.write_json(tmp_path / "config.json", config | {"model_type": "llama", "rope_scaling": {"factor": 8.0}})
    with pytest.raises(ValueError, match=r"without rope_scaling only, not with \{'factor': 8\.0\}"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "F32")
    with pytest.raises(ValueError, match=r"no tensor .model\.layers\.0"):
        gguf_name("model.layers.0.self_attn.rotary.weight")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def written(tiny_base: Path, folder: Path, pre_tokenizer: Any, more: dict[str, int]) -> None:
    """A GGUF of the tiny model with that pre-tokenizer, and `more` in its vocabulary."""
    shutil.copytree(tiny_base, folder)
    tokenizer = files.read_json(folder / "tokenizer.json")
    tokenizer["pre_tokenizer"] = pre_tokenizer
    tokenizer["model"]["vocab"] |= more
    tokenizer["model"]["byte_fallback"] = True  # as the default base's, which falls back to nothing
    files.write_json(folder / "tokenizer.json", tokenizer)
    export_gguf(folder, folder / "m.gguf", "F32")


@pytest.mark.parametrize("pre_tokenizer", [BYTE_LEVEL, {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}])
def test_smollm_s_tokenizer_is_written(tiny_base: Path, tmp_path: Path, pre_tokenizer: Any) -> None:
    """The first is the default base's, the second that of SmolLM2's authors."""
    written(tiny_base, tmp_path / "tuned", pre_tokenizer, {})
    assert (tmp_path / "tuned/m.gguf").exists()


@pytest.mark.parametrize(
    ("pre_tokenizer", "found"),
    [
        (None, "None"),
        (BYTE_LEVEL | {"add_prefix_space": True}, ".*'add_prefix_space': True"),
        (BYTE_LEVEL | {"use_regex": False}, ".*'use_regex': False"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, BYTE_LEVEL]}, ".*'type': 'Split'"),
    ],
)
def test_other_pre_tokenizers_are_refused(tiny_base: Path, tmp_path: Path, pre_tokenizer: Any, found: str) -> None:
    """Llama 3's was written as SmolLM's: llama.cpp cut its texts elsewhere."""
    with pytest.raises(ValueError, match=f"SmolLM's pre-tokenizer only, .*, not with {found}"):
        written(tiny_base, tmp_path / "tuned", pre_tokenizer, {})


def test_a_bpe_with_tokens_for_bytes_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Llama 2's was written as if its vocabulary were byte-level."""
    with pytest.raises(ValueError, match="not of one with byte_fallback"):
        written(tiny_base, tmp_path / "tuned", BYTE_LEVEL, {"<0x00>": 0})

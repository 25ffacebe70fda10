"""The tuned model as a GGUF file, for llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline import files

QUANTIZATIONS = (
    "F32",
    "F16",
    "Q8_0",
    "Q5_0",
    "Q4_0",
)  # the ones the gguf package can write; K-quants need llama.cpp itself
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def export_gguf(tuned: Path, out: Path, quantization: str) -> None:
    """Norms stay in float32; the embedding, which is also the head, is quantized like the rest.

    Raises ValueError unless the model is a Llama with unscaled rotary positions and SmolLM's kind of byte-level BPE:
    others need llama.cpp's own converter.
    """
    config = files.read_json(tuned / "config.json")
    if config["model_type"] != "llama":
        raise ValueError(f"{tuned}: a GGUF is written of llama models only, not of {config['model_type']!r}")
    if config.get("rope_scaling"):
        raise ValueError(f"{tuned}: a GGUF is written without rope_scaling only, not with {config['rope_scaling']}")
    writer = gguf.GGUFWriter(out, "llama")
    _write_settings(writer, config)
    _write_tokenizer(writer, tuned, config)
    kind = gguf.GGMLQuantizationType[quantization]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if quantization == "F32" else f"MOSTLY_{quantization}"])
    for name, weight in load_file(tuned / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor = np.ascontiguousarray(_permuted(name, weight.astype(np.float32), config))
        if tensor.ndim == 1 or quantization == "F32":
            writer.add_tensor(gguf_name(name), tensor)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`. Raises ValueError for any other name."""
    known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, part = name.rpartition(".")
    if stem in known:
        return f"{known[stem]}.{part}"
    match stem.split(".", 3):
        case ["model", "layers", layer, inside] if inside in _NAMES:
            return f"blk.{layer}.{_NAMES[inside]}.{part}"
    raise ValueError(f"a Llama has no tensor {name!r}")


def _permuted(name: str, weight: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Reorder rows of query and key: llama.cpp has rotary pairs side by side, transformers half a head apart."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2]) if "." in name else None
    if count is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: gguf.GGUFWriter, tuned: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((tuned / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{tuned}: a GGUF is written of byte-level BPE tokenizers only, not of {model['type']}")
    if "<0x00>" in model["vocab"]:  # `byte_fallback` does not tell: the default base sets it without such tokens
        raise ValueError(f"{tuned}: a GGUF is written of byte-level BPE tokenizers only, not of one with byte_fallback")
    _require_smollm_pre_tokenizer(tuned, tokenizer)
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {at: token for token, at in model["vocab"].items()} | added
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens.get(at, f"[unused{at}]") for at in ids])
    writer.add_token_types([control if at in added else normal if at in tokens else unused for at in ids])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)
    template = tuned / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _require_smollm_pre_tokenizer(tuned: Path, tokenizer: dict[str, Any]) -> None:
    """llama.cpp's `smollm` splits off single digits, then as GPT-2. The default base's file lacks the first step.

    Its vocabulary has no token of two digits, so the difference shows only after several spaces before a digit.
    """
    found = tokenizer["pre_tokenizer"] or {}
    digits = {"type": "Digits", "individual_digits": True}
    match found.get("pretokenizers", [found]):
        case [*before, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}] if before in ([], [digits]):
            return
    raise ValueError(
        f"{tuned}: a GGUF is written with SmolLM's pre-tokenizer only, ByteLevel with use_regex and without "
        f"add_prefix_space, alone or after Digits with individual_digits, not with {tokenizer['pre_tokenizer']}"
    )

"""Shapes of well-known models, for models with random weights: these show speed and nothing else.

Two things differ from the published models, but not in speed: a context of 4,096 tokens, no scaled rotary frequencies.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = {"max_position_embeddings": 4096, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Shape:
    source: str
    config: dict[str, Any]


SHAPES = {
    "smollm2-135m": Shape(
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json",
        CONTEXT
        | {
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
        },
    ),
    "smollm2-360m": Shape(
        "https://huggingface.co/HuggingFaceTB/SmolLM2-360M-Instruct/blob/main/config.json",
        CONTEXT
        | {
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
        },
    ),
    "qwen2.5-0.5b": Shape(
        "https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json",
        CONTEXT
        | {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        },
    ),
    "llama-3.2-1b": Shape(
        "https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json",
        CONTEXT
        | {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
        },
    ),
    "phi-4-mini": Shape(
        "https://huggingface.co/microsoft/Phi-4-mini-instruct/blob/main/config.json",
        CONTEXT
        | {
            "model_type": "phi3",
            "vocab_size": 200_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
        },
    ),
}


def random_model(shape: Shape, tokenizer: Path, out: Path) -> None:
    """A folder as `train` writes it, in float32. `tokenizer`: a folder with any tokenizer: exporters need one."""
    import torch  # here, so that reading SHAPES does not import it
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.model.onnx_export import copy_tokenizer

    torch.manual_seed(0)
    settings = dict(shape.config)
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    copy_tokenizer(tokenizer, out)
    AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).save_pretrained(out)

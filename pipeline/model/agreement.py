"""How closely two ways of running a model agree on the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from pipeline.model.base import load_tuned
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import Request
from pipeline.toolcall.tokenizer import Tokenizer

Logits = NDArray[np.float32]  # (positions, vocabulary)


def texts(tokenizer: Any, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of each request's prefix, conversation and right reply."""
    return [
        prompt.prefix_tokens(tokenizer, request.tools)
        + prompt.request_tokens(tokenizer, request.messages, request.tools)
        + (prompt.reply_tokens(tokenizer, request) if request.expected else [])
        for request in requests
    ]


def logits(folder: Path, tokens: Sequence[list[int]]) -> list[Logits]:
    """Of each row of `tokens`, computed on the CPU from the ONNX graph or PyTorch weights in `folder`."""
    return (onnx_logits if (folder / "model.onnx").exists() else pytorch_logits)(folder, tokens)


def pytorch_logits(folder: Path, tokens: Sequence[list[int]]) -> list[Logits]:
    model, _ = load_tuned(folder)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits[0].numpy() for row in tokens]


def onnx_logits(folder: Path, tokens: Sequence[list[int]]) -> list[Logits]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return [session.run(["logits"], feed(session, row))[0][0].astype(np.float32) for row in tokens]


def feed(
    session: onnxruntime.InferenceSession, tokens: list[int], past: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Input values of a decoder graph, by name: for a text from its beginning, or to continue a KV cache, `past`."""
    before = next(iter(past.values())).shape[2] if past else 0
    values: dict[str, Any] = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, before + len(tokens)), np.int64),
    }
    for found in session.get_inputs():
        if found.name.startswith("past_key_values"):
            kind = np.float16 if found.type == "tensor(float16)" else np.float32
            empty = np.zeros((1, found.shape[1], 0, found.shape[3]), kind)
            values[found.name] = past[found.name] if past else empty
        elif found.name == "keep":
            values["keep"] = np.array([len(tokens)], np.int64)
        elif found.name == "start":
            values["start"] = np.array([-len(tokens)], np.int64)
        elif found.name == "position_ids":
            values[found.name] = np.arange(before, before + len(tokens), dtype=np.int64)[None]
    return values


def parity(tuned: Path, exported: Path, requests: Sequence[Request], max_new_tokens: int) -> dict[str, float]:
    """Largest logit difference from PyTorch, and share of equal greedy replies, over requests that fit the context.

    Raises ValueError if none fits.
    """
    from pipeline.runtime.caller import ToolCaller, load_runtime
    from pipeline.runtime.generation import PLAIN

    tokenizer = Tokenizer(tuned)
    callers = [
        ToolCaller(load_runtime(folder, "cpu", torch.get_num_threads()), tokenizer, (), PLAIN)
        for folder in (tuned, exported)
    ]
    fitting = [r for r in requests if all(caller.fits(r.messages, r.tools, max_new_tokens) for caller in callers)]
    if not fitting:
        raise ValueError(f"{exported}: none of {len(requests)} test requests to compare on fits its context")
    rows = texts(tokenizer, fitting)
    pairs = zip(pytorch_logits(tuned, rows), logits(exported, rows), strict=True)
    difference = max(float(np.abs(one - other).max()) for one, other in pairs)
    replies = [[caller.reply(r.messages, r.tools, max_new_tokens).text for r in fitting] for caller in callers]
    same = sum(one == other for one, other in zip(*replies, strict=True))
    return {"max_logit_difference": difference, "same_reply_fraction": same / len(fitting)}


def closeness(reference: Path, other: Path, requests: Sequence[Request]) -> dict[str, float]:
    """Share of equal greedy tokens and mean KL divergence in nats, where the right reply's tokens are predicted.

    The prompt is left out: the model never predicts it and was not trained to.
    """
    tokenizer = Tokenizer(reference)
    rows = texts(tokenizer, requests)
    asked_for = [
        slice(
            len(prompt.prefix_tokens(tokenizer, r.tools))
            + len(prompt.request_tokens(tokenizer, r.messages, r.tools))
            - 1,
            -1 if r.expected else None,
        )
        for r in requests
    ]
    same = divergence = positions = 0.0
    pairs = zip(onnx_logits(reference, rows), onnx_logits(other, rows), asked_for, strict=True)
    for one, two, positions_asked in pairs:
        p, q = _log_softmax(one[positions_asked]), _log_softmax(two[positions_asked])
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((np.exp(p) * (p - q)).sum())
        positions += len(p)
    return {"same_token_fraction": same / positions, "kl_divergence": divergence / positions}


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))

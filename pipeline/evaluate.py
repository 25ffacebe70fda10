"""Stage `evaluate`: how often a variant's calls are right.

Reads the variant's model and data/prepared/test.jsonl; writes reports/evaluate/{variant}.json and
the replies beside it. Any file of requests can be scored: evaluate.requests=FILE.jsonl evaluate.out=FILE.json.
Requests later in a conversation also get figures of their own: those in the file, and those in FILE-later.jsonl if
it exists (here: test-later.jsonl).
With evaluate.device=cuda: the models of bench/cuda.py and reports/evaluate/cuda/{variant}.json, which holds scores
only if the replies agree with the CPU's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from pipeline import config, files
from pipeline.bench import cuda
from pipeline.bench.accuracy import Answer, measures, row, summary
from pipeline.bench.inputs import beside, inputs_sha256
from pipeline.bench.statistics import mcnemar_p
from pipeline.provenance import provenance
from pipeline.runtime.caller import ToolCaller, TooLongError
from pipeline.runtime.generation import PLAIN, RowsRuntime, Techniques, generate_together
from pipeline.toolcall import reply as replies
from pipeline.toolcall import score
from pipeline.toolcall.conversation import Request
from pipeline.toolcall.keyword import keyword_call, parse_rules
from pipeline.toolcall.requests import read_requests
from pipeline.toolcall.tool import Tool, find_tool, parse_tools

log = logging.getLogger(__name__)

BASE = "base"
FOLDERS = {
    BASE: "base",
    "torch-fp32": "tuned",
    "onnx-fp32": "onnx",
    "fused-fp32": "fused",
    "int8": "int8",
    "int4": "int4",
}
KEYWORD = "keyword"
HELD = ("fused-fp32", "int8", "int4")  # use the grammar and all other techniques; the rest decode greedily
BATCH = 16  # requests answered together, if the runtime can
REFERENCE = "fused-fp32"  # quantized variants are compared with it, request by request
TOO_LONG = Answer(replies.OPENING, confidence=0.0)  # for a request that does not fit the context: a malformed call


@dataclass
class EvaluateConfig:
    device: str
    min_same_reply_fraction: float  # on CUDA: share of the replies that must equal the CPU's
    requests: Path
    out: Path | None  # empty: reports/evaluate/{variant}.json
    base_requests: int  # for the untuned base model, evenly spaced; not all, because it writes long texts
    max_new_tokens: int
    threads: int

    def __post_init__(self) -> None:
        config.require_one_of("evaluate.device", self.device, ["cpu", "cuda"])
        config.require_range("evaluate.min_same_reply_fraction", self.min_same_reply_fraction, 0, 1)
        config.require_range("evaluate.base_requests", self.base_requests, 1, 1_000_000)
        config.require_range("evaluate.max_new_tokens", self.max_new_tokens, 1, 100_000)
        config.require_range("evaluate.threads", self.threads, 1, 1024)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    techniques: Techniques
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        known = cuda.FOLDERS if self.evaluate.device == "cuda" else [*FOLDERS, KEYWORD]
        config.require_one_of("variant", self.variant, list(known))


def run(paths: config.Paths, out: Path, variant: str, techniques: Techniques, cfg: EvaluateConfig) -> dict[str, Any]:
    tools = parse_tools(files.read_json(paths.tools), str(paths.tools))
    requests = read_requests(cfg.requests, tools, cfg.base_requests if variant == BASE else None)
    every = [*requests, *([] if variant == BASE else read_later(cfg.requests, tools, requests))]
    log.info("%s: %d requests", variant, len(every))
    # No reuse of earlier requests' KV cache: with int8, rounding would depend on what it holds.
    use = replace(techniques, conversation_tokens=0) if variant in HELD or variant in cuda.HELD else PLAIN
    made = answers(paths, variant, every, use, cfg)
    metrics: dict[str, Any] = {"variant": variant}
    if cfg.device == "cuda":
        on_cpu = answers(paths, variant, every, use, cfg, on_cpu=True)
        metrics |= parity(out, variant, (made, on_cpu), (techniques, cfg))
    rows, too_long = score_all(every, made, apart=len(every) - len(requests))
    reference, precision = (cuda.REFERENCE, "fp16") if cfg.device == "cuda" else (REFERENCE, "fp32")
    metrics |= measures(requests, rows[: len(requests)])
    later = [(request, found) for request, found in zip(every, rows, strict=True) if len(request.messages) > 1]
    if later:
        metrics["later"] = summary(*zip(*later, strict=True)) | {"apart": len(every) - len(requests)}
    if too_long:
        metrics["too_long"] = len(too_long)
        log.warning("%s: requests that do not fit the context: %s", variant, too_long)
    if variant == reference:
        metrics["different_from_torch"] = different(out.with_name("torch-fp32.replies.jsonl"), rows[: len(requests)])
    if variant in ("int8", "int4"):
        key, other = f"mcnemar_p_vs_{precision}", out.with_name(f"{reference}.replies.jsonl")
        metrics[key] = compare(other, rows[: len(requests)])
        if later:
            metrics["later"][key] = compare(other, [found for _, found in later])
    files.write_jsonl(out.with_suffix(".replies.jsonl"), rows)
    origin = provenance((techniques, cfg)) | {"inputs_sha256": inputs_sha256(cfg.requests, folder(paths, variant, cfg))}
    files.write_json(out, metrics | {"provenance": origin})
    log.info("%s: %.1f%% exact", variant, 100 * metrics["exact_call_fraction"])
    return metrics


def read_later(path: Path, tools: tuple[Tool, ...], requests: Sequence[Request]) -> list[Request]:
    """Requests in FILE-later.jsonl; none if it is missing or empty. Raises ValueError for an id in `requests`."""
    more = beside(path)
    later = read_requests(more, tools) if more.exists() and more.stat().st_size else []
    if twins := {request.id for request in later} & {request.id for request in requests}:
        raise ValueError(f"{more}: id: {sorted(twins)[0]!r} stands in {path}, too")
    return later


def score_all(
    requests: Sequence[Request], made: Sequence[Answer], apart: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per request, and the ids of those that do not fit the context: malformed, even if no call is right.

    The last `apart` rows are marked `apart`: the overall figures leave them out.
    """
    rows = [row(request, answer) for request, answer in zip(requests, made, strict=True)]
    for at, found in enumerate(rows):
        found["apart"] = at >= len(rows) - apart
    too_long = [found for found, answer in zip(rows, made, strict=True) if answer is TOO_LONG]
    for found in too_long:
        found["outcome"] = score.Outcome.MALFORMED
    return rows, [found["id"] for found in too_long]


def parity(
    out: Path,
    variant: str,
    made: tuple[Sequence[Answer], Sequence[Answer]],
    settings: tuple[Techniques, EvaluateConfig],
) -> dict[str, Any]:
    """`made`: answers on the GPU and on the CPU. Raises RuntimeError if too few are equal."""
    least = settings[1].min_same_reply_fraction
    same = cuda.same_reply_fraction(*([answer.text for answer in side] for side in made))
    gate = {
        "device": "cuda",
        "gpu": gpu_name(),
        "same_reply_fraction_vs_cpu": same,
        "min_same_reply_fraction": least,
        "withheld": same < least,
    }
    if gate["withheld"]:  # leave only the share, and nothing of an earlier run that may have passed
        out.with_suffix(".replies.jsonl").unlink(missing_ok=True)
        files.write_json(out, {"variant": variant, **gate, "provenance": provenance(settings)})
    cuda.require_parity(variant, same, least)
    return gate


def gpu_name() -> str:
    from pipeline.bench.gpu import Gpu

    return str(Gpu().facts()["name"])


def folder(paths: config.Paths, variant: str, cfg: EvaluateConfig) -> Path | None:
    """Where the variant's model is; keyword has none."""
    if variant == KEYWORD:
        return None
    return paths.models / (cuda.FOLDERS if cfg.device == "cuda" else FOLDERS)[variant]


def answers(
    paths: config.Paths,
    variant: str,
    requests: Sequence[Request],
    techniques: Techniques,
    cfg: EvaluateConfig,
    on_cpu: bool = False,
) -> list[Answer]:
    """`on_cpu`: the model for `cfg.device` is run on the CPU."""
    model = folder(paths, variant, cfg)
    if model is None:
        rules = parse_rules(files.read_json(paths.keywords), str(paths.keywords)) if paths.keywords.exists() else []
        if not any(find_tool(request.tools, rule.tool) for request in requests for rule in rules):
            log.warning("%s: no rule for a tool on offer, so the keyword baseline never calls", paths.keywords)
        calls = [keyword_call(last_words(request), rules, request.tools) for request in requests]
        return [Answer(replies.write_call(call) if call else "") for call in calls]
    device = "cpu" if on_cpu else cfg.device
    caller = ToolCaller.load(model, paths.tools, device, cfg.threads, techniques)
    if techniques == PLAIN and isinstance(caller.runtime, RowsRuntime):
        return together(caller, caller.runtime, requests, cfg)
    return [alone(caller, request, cfg.max_new_tokens) for request in tqdm(requests, desc=variant, mininterval=5)]


def last_words(request: Request) -> str:
    """The user's last message."""
    return next(message["content"] for message in reversed(request.messages) if message["role"] == "user")


def alone(caller: ToolCaller, request: Request, max_new_tokens: int) -> Answer:
    try:
        reply = caller.reply(request.messages, request.tools, max_new_tokens)
    except TooLongError:
        return TOO_LONG
    return Answer(reply.text, reply.confidence, reply.changed)


def together(
    caller: ToolCaller, runtime: RowsRuntime, requests: Sequence[Request], cfg: EvaluateConfig
) -> list[Answer]:
    """The same greedy replies in batches: one by one, PyTorch takes over a second for each."""
    asked: dict[int, tuple[list[int], list[int]]] = {}
    found: dict[int, Answer] = {}
    for at, request in enumerate(requests):
        try:
            asked[at] = caller.encode(request.messages, request.tools, cfg.max_new_tokens)
        except TooLongError:
            found[at] = TOO_LONG
    order = sorted(asked, key=lambda at: (asked[at][0], len(asked[at][1])))
    with tqdm(total=len(asked), mininterval=5) as progress:
        for prefix, members in groupby(order, key=lambda at: asked[at][0]):
            rest = list(members)
            for batch in (rest[at : at + BATCH] for at in range(0, len(rest), BATCH)):
                prompts = [asked[at][1] for at in batch]
                made = generate_together(runtime, prefix, prompts, caller.tokenizer.eos_token_id, cfg.max_new_tokens)
                found |= {
                    at: Answer(*caller.decode(tokens, requests[at].tools))
                    for at, tokens in zip(batch, made, strict=True)
                }
                progress.update(len(batch))
    return [found[at] for at in range(len(requests))]


def compare(reference: Path, rows: Sequence[dict[str, Any]]) -> float | None:
    """McNemar's p-value; None if the reference was not scored on the same requests, as with a user's own file."""
    theirs = on_same_requests(reference, rows)
    if theirs is None:
        return None
    exact = score.Outcome.EXACT
    return mcnemar_p([found["outcome"] == exact for found in theirs], [row["outcome"] == exact for row in rows])


def different(other: Path, rows: Sequence[dict[str, Any]]) -> list[str] | None:
    """Ids of requests whose replies differ though neither grammar nor candidate calls changed the greedy reply.

    None if the other variant was not scored on the same requests.
    """
    theirs = on_same_requests(other, rows)
    if theirs is None:
        return None
    pairs = zip(theirs, rows, strict=True)
    return [row["id"] for found, row in pairs if not row["changed"] and row["reply"] != found["reply"]]


def on_same_requests(replies: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Another variant's rows, in the order of `rows`; ids alone would match requests that were edited since."""
    if not replies.exists():
        return None
    found = {(row["id"], row["request"]): row for _, row in files.read_jsonl(replies)}
    asked = [(row["id"], row["request"]) for row in rows]
    return [found[one] for one in asked] if set(asked) <= found.keys() else None


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    folder = params.paths.reports / ("evaluate" if params.evaluate.device == "cpu" else "evaluate/cuda")
    default = folder / f"{params.variant}.json"
    run(params.paths, params.evaluate.out or default, params.variant, params.techniques, params.evaluate)


if __name__ == "__main__":
    main()

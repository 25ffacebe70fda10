"""Stage `evaluate`: how often the calls of a variant are right.

Reads the variant's model and data/prepared/test.jsonl; writes reports/evaluate/{variant}.json and
the replies beside it. Any requests file can be scored: evaluate.requests=FILE.jsonl evaluate.out=FILE.json.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from pipeline import config, files
from pipeline.bench.statistics import mcnemar_p, wilson_interval
from pipeline.provenance import provenance
from pipeline.runtime.caller import ToolCaller
from pipeline.toolcall import reply as replies
from pipeline.toolcall import score
from pipeline.toolcall.conversation import Request, parse_request
from pipeline.toolcall.keyword import keyword_call, parse_rules
from pipeline.toolcall.tool import parse_tools

log = logging.getLogger(__name__)

FOLDERS = {
    "base": "base",
    "torch-fp32": "tuned",
    "onnx-fp32": "onnx",
    "fused-fp32": "fused",
    "int8": "int8",
    "int4": "int4",
}
KEYWORD = "keyword"
REFERENCE = "fused-fp32"  # quantized variants are compared with it, request by request


@dataclass
class EvaluateConfig:
    requests: Path
    out: Path | None  # empty: reports/evaluate/{variant}.json
    max_new_tokens: int
    threads: int

    def __post_init__(self) -> None:
        config.require_range("evaluate.max_new_tokens", self.max_new_tokens, 1, 100_000)
        config.require_range("evaluate.threads", self.threads, 1, 1024)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        config.require_one_of("variant", self.variant, [*FOLDERS, KEYWORD])


Answer = Callable[[Request], tuple[str, float]]  # the reply's text and the model's confidence in it


def run(paths: config.Paths, out: Path, variant: str, cfg: EvaluateConfig) -> dict[str, Any]:
    tools = parse_tools(files.read_json(paths.tools), str(paths.tools))
    requests = [parse_request(value, tools, where) for where, value in files.read_jsonl(cfg.requests)]
    if not requests:
        raise ValueError(f"{cfg.requests}: holds no request")
    answer = answerer(paths, variant, cfg)
    log.info("%s: %d requests", variant, len(requests))
    rows = [row(request, *answer(request)) for request in tqdm(requests, desc=variant, mininterval=5)]
    replies_file = out.with_suffix(".replies.jsonl")
    metrics = {"variant": variant, **measures(requests, rows)}
    reference = out.with_name(f"{REFERENCE}.replies.jsonl")
    if variant == REFERENCE:
        metrics["different_from_torch"] = different(out.with_name("torch-fp32.replies.jsonl"), rows)
    if variant in ("int8", "int4"):
        metrics["mcnemar_p_vs_fp32"] = compare(reference, rows)
    files.write_jsonl(replies_file, rows)
    files.write_json(out, metrics | {"provenance": provenance(cfg)})
    log.info("%s: %.1f%% exact", variant, 100 * metrics["exact_call_fraction"])
    return metrics


def answerer(paths: config.Paths, variant: str, cfg: EvaluateConfig) -> Answer:
    if variant == KEYWORD:
        rules = parse_rules(files.read_json(paths.tools.with_name("keywords.json")))

        def by_keyword(request: Request) -> tuple[str, float]:
            call = keyword_call(request.messages[-1]["content"], rules)
            return (replies.write_call(call) if call else "", 1.0)

        return by_keyword

    folder = paths.models / FOLDERS[variant]
    caller = ToolCaller.load(folder, paths.tools, threads=cfg.threads)

    def by_model(request: Request) -> tuple[str, float]:
        made = caller.reply(request.messages, request.tools, cfg.max_new_tokens)
        return made.text, made.confidence

    return by_model


def row(request: Request, text: str, confidence: float) -> dict[str, Any]:
    made = replies.parse_call(text)
    return {
        "id": request.id,
        "category": request.category,
        "outcome": score.outcome(text, request.tools, request.expected, request.accept),
        "right_tool": (made.name if made else None) == (request.expected.name if request.expected else None)
        and replies.attempts_call(text) == (request.expected is not None),
        "valid": not replies.attempts_call(text) or (made is not None and score.is_valid(made, request.tools)),
        "called": replies.attempts_call(text),
        "confidence": confidence,
        "reply": text,
    }


def measures(requests: Sequence[Request], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(rows)
    exact = [found["outcome"] == score.Outcome.EXACT for found in rows]
    must_call = [row for row, request in zip(rows, requests, strict=True) if request.expected]
    abstain = [row for row, request in zip(rows, requests, strict=True) if not request.expected]
    categories = sorted({request.category for request in requests})
    return {
        "n": n,
        "exact_call_fraction": sum(exact) / n,
        "exact_call_ci95": list(wilson_interval(sum(exact), n)),
        "right_tool_fraction": _share(rows, "right_tool"),
        "valid_call_fraction": _share([row for row in rows if row["called"]], "valid"),
        "must_call_fraction": _share(must_call, "called"),
        "abstain_fraction": None if not abstain else 1 - (_share(abstain, "called") or 0),
        "outcomes": dict(Counter(str(found["outcome"]) for found in rows)),
        "by_category": {
            name: {
                "n": sum(request.category == name for request in requests),
                "exact_call_fraction": sum(
                    hit for hit, request in zip(exact, requests, strict=True) if request.category == name
                )
                / sum(request.category == name for request in requests),
            }
            for name in categories
        },
        # The constraint (a grammar) is not there yet: it changed nothing.
        "constraint_changed_fraction": 0.0,
    }


def _share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """None where there are no rows: no share is not a share of zero."""
    return sum(bool(row[key]) for row in rows) / len(rows) if rows else None


def compare(reference: Path, rows: Sequence[dict[str, Any]]) -> float | None:
    """None where the reference was not scored on the same requests, as with a file of the user's own."""
    if not reference.exists():
        return None
    other = {found["id"]: found for _, found in files.read_jsonl(reference)}
    if other.keys() != {row["id"] for row in rows}:
        return None
    exact = score.Outcome.EXACT
    return mcnemar_p([other[row["id"]]["outcome"] == exact for row in rows], [row["outcome"] == exact for row in rows])


def different(other: Path, rows: Sequence[dict[str, Any]]) -> list[str] | None:
    """Ids of the requests whose replies differ; None where the other variant was not scored on them."""
    if not other.exists():
        return None
    texts = {found["id"]: found["reply"] for _, found in files.read_jsonl(other)}
    return [row["id"] for row in rows if row["reply"] != texts.get(row["id"])]


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    default = params.paths.reports / "evaluate" / f"{params.variant}.json"
    run(params.paths, params.evaluate.out or default, params.variant, params.evaluate)


if __name__ == "__main__":
    main()

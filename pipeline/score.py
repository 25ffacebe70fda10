"""Score the calls of any other model, such as a hosted one. Not a stage.

    python -m pipeline.score score.replies=haiku.jsonl

The file has one line per test request: `{"id": "grep-07", "call": {"name": "Grep", "arguments": {...}}}`, or
`"call": null` if the model made none (docs/USAGE.md shows how to make the file). Writes the measures of the stage
`evaluate` to haiku.scores.json beside it, with the exact McNemar test against each variant scored on the same requests.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench.accuracy import Answer, measures, row
from pipeline.evaluate import HELD, compare
from pipeline.toolcall.conversation import Request
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.requests import read_requests
from pipeline.toolcall.tool import ToolCall, parse_tools

log = logging.getLogger(__name__)


@dataclass
class ScoreConfig:
    replies: Path | None  # to be given on the command line
    requests: Path


@dataclass
class Params:
    paths: config.Paths
    score: ScoreConfig


def run(paths: config.Paths, cfg: ScoreConfig) -> dict[str, Any]:
    """Raises ValueError unless the file has exactly one reply to each request."""
    if cfg.replies is None:
        raise ValueError("score.replies: name the file with the other model's replies")
    tools = parse_tools(files.read_json(paths.tools), str(paths.tools))
    requests = read_requests(cfg.requests, tools)
    answers = read_answers(cfg.replies, requests)
    rows = [row(request, answers[request.id]) for request in requests]
    found = measures(requests, rows)
    del found["calibration"], found["constraint_changed_fraction"]  # need confidences and our decoding
    others = {name: compare(paths.reports / f"evaluate/{name}.replies.jsonl", rows) for name in HELD}
    found["mcnemar_p_vs"] = {name: p for name, p in others.items() if p is not None}
    files.write_json(cfg.replies.with_suffix(".scores.json"), found)
    low, high = found["exact_call_ci95"]
    exact, p = found["exact_call_fraction"], found["mcnemar_p_vs"]
    log.info("%.1f%% exact (%.1f to %.1f) of %d; p against %s", 100 * exact, 100 * low, 100 * high, len(rows), p)
    return found


def read_answers(path: Path, requests: list[Request]) -> dict[str, Answer]:
    """Answers by request id. Raises ValueError naming file and line of an invalid one, or requests without a reply."""
    asked, answers = {request.id for request in requests}, dict[str, Answer]()
    for where, value in files.read_jsonl(path):
        match value:
            case {"id": str(name), "call": None}:
                answer = Answer("")
            case {"id": str(name), "call": {"name": str(tool), "arguments": dict(arguments)}}:
                answer = Answer(write_call(ToolCall(tool, arguments)))
            case _:
                raise ValueError(f"{where}: expected an id, and a call with name and arguments or null: {value!r:.120}")
        if name not in asked or name in answers:
            raise ValueError(f"{where}: id: {name!r} {'was there before' if name in answers else 'is of no request'}")
        answers[name] = answer
    if missing := sorted(asked - answers.keys()):
        raise ValueError(f"{path}: no reply to {len(missing)} of {len(asked)} requests: {missing[:5]}")
    return answers


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths, params.score)


if __name__ == "__main__":
    main()

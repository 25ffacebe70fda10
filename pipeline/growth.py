"""How a call's time and memory grow, beside the limits of arithmetic and memory bandwidth. Not a stage.

    python -m pipeline.growth                            all three parts, in about 10 minutes on two cores
    python -m pipeline.growth 'growth.parts=[clients]'   some; earlier measurements of the others are kept

prompt: a call's time and memory by the request's tokens, after the tools' cached prefix; fixed number of new tokens.
clients: calls/s and p95 on test requests by number of clients, decoded together as in the stage `benchmark`.
sizes: calls of fixed lengths with the shapes of larger models. Speed only: the weights are random.
Writes reports/growth.json after each part, and growth-*.png; the stage `report` shows both.
"""

import logging
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import limits
from pipeline.bench.limits import Architecture, Lengths, Machine
from pipeline.bench.statistics import percentiles
from pipeline.benchmark import FOLDERS, HELD, BenchmarkConfig, ask, many_clients, read_bandwidth_bytes_per_s
from pipeline.model.shape import SHAPES, Shape
from pipeline.provenance import provenance
from pipeline.runtime import ort
from pipeline.runtime.caller import ToolCaller
from pipeline.runtime.fixed import call, peak_rss_bytes
from pipeline.runtime.generation import LONGEST_DRAFT, Runtime, Techniques
from pipeline.serving.engine import Engine
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import parse_request
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, parse_tools

# Every measured process imports this module, and its memory counts as the model's: no PyTorch, no matplotlib here.

log = logging.getLogger(__name__)

PARTS = ("prompt", "clients", "sizes")
QUANTIZED = ("int8", "int4")
PLAINLY = {"algorithm": "rtn", "eight_bit_products": 0, "tuning_steps": 0}  # no other rounding helps random weights
FILLER = "The morning was calm, and people went about their work as they did on any other day. "
QUESTION = "Now search for TODO in src."


@dataclass
class GrowthConfig:
    parts: list[str]
    threads: int
    prompt_tokens: list[int]  # lengths of the request, which is not cached
    clients: list[int]
    shapes: list[str]
    prefix_tokens: int  # for part `sizes`, like request_tokens
    request_tokens: int
    new_tokens: int  # for parts `prompt` and `sizes`
    warmup_calls: int
    calls: int  # a measurement makes at least this many ...
    min_s: float  # ... and lasts at least this long

    def __post_init__(self) -> None:
        for part in self.parts:
            config.require_one_of("growth.parts", part, PARTS)
        config.require_ranges("growth.prompt_tokens", self.prompt_tokens, 32, 100_000)
        config.require_ranges("growth.clients", self.clients, 1, 10_000)
        for shape in self.shapes:
            config.require_one_of("growth.shapes", shape, list(SHAPES))
        config.require_range("growth.threads", self.threads, 1, 1024)
        for name in ("prefix_tokens", "request_tokens", "new_tokens"):
            config.require_range(f"growth.{name}", getattr(self, name), 1, 1000)
        config.require_range("growth.warmup_calls", self.warmup_calls, 0, 1000)
        config.require_range("growth.calls", self.calls, 1, 100_000)
        config.require_range("growth.min_s", self.min_s, 0, 86_400)


@dataclass
class Params:
    paths: config.Paths
    techniques: Techniques
    benchmark: BenchmarkConfig  # requests, how many are decoded together, calls per client
    quantize: dict[str, Any]  # settings of int8 and int4, for part `sizes`
    growth: GrowthConfig


def run(params: Params, shapes: dict[str, Shape]) -> dict[str, Any]:
    """`shapes`: SHAPES, or smaller ones to try things with."""
    from pipeline.bench import growth_section  # matplotlib

    paths, cfg = params.paths, params.growth
    report = paths.reports / "growth.json"
    found: dict[str, Any] = files.read_json(report) if report.exists() else {}
    machine = measure_machine(cfg.threads)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "prompt": lambda: by_prompt(paths, cfg, machine),
        "clients": lambda: by_clients(params, machine),
        "sizes": lambda: by_size(params, shapes, machine),
    }
    for part in cfg.parts:
        log.info("%s ...", part)
        found[part] = {
            "variants": measures[part](),
            "machine": asdict(machine),
            "provenance": provenance((params.techniques, params.benchmark, cfg)),
        }
        files.write_json(report, found)
        growth_section.plots(found, paths.reports)
    log.info("measured: %s; see %s", ", ".join(cfg.parts), report)
    return found


def measure_machine(threads: int) -> Machine:
    return Machine(
        read_bandwidth_bytes_per_s(threads),
        limits.product_operations_per_s("float32", threads),
        limits.product_operations_per_s("int8", threads),
    )


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work` in its own process, so that no memory is left over from the one before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def by_prompt(paths: config.Paths, cfg: GrowthConfig, machine: Machine) -> dict[str, Any]:
    """Raises ValueError, before anything is measured, if a call would not fit the model's context."""
    tools = parse_tools(files.read_json(paths.tools), str(paths.tools))
    folders = {variant: paths.models / FOLDERS[variant] for variant in HELD}
    tokenizer = Tokenizer(folders["int8"])
    prefix = prompt.prefix_tokens(tokenizer, tools)
    for folder in folders.values():
        _require_context(folder, len(prefix) + max(cfg.prompt_tokens) + cfg.new_tokens)
    found: dict[str, Any] = {}
    for variant, folder in folders.items():
        found[variant] = {"model_bytes": _model_bytes(folder), "prefix_tokens": len(prefix), "by_tokens": []}
        for tokens in cfg.prompt_tokens:
            asked = request_of(tokens, tokenizer, tools)
            made = apart(measure, folder, prefix, asked, cfg)
            lengths = Lengths(len(prefix), tokens, cfg.new_tokens)
            row = {"prompt_tokens": tokens, **made, **_limits(folder, variant, machine, lengths)}
            found[variant]["by_tokens"].append(row)
            log.info("%s, %d tokens: p50 %.0f ms", variant, tokens, 1e3 * made["call_s"]["p50"])
    return found


def _require_context(folder: Path, needed: int) -> None:
    context = int(files.read_json(folder / "config.json")["max_position_embeddings"])
    if needed + LONGEST_DRAFT > context:
        raise ValueError(
            f"growth.prompt_tokens: a call of {needed} tokens, and {LONGEST_DRAFT} to spare, do not fit "
            f"the context of {folder}: {context} tokens"
        )


def request_of(tokens: int, tokenizer: Any, tools: Sequence[Tool]) -> list[int]:
    """A request of exactly `tokens` tokens: filler text, cut in its middle, and a question."""
    asked = prompt.request_tokens(tokenizer, [{"role": "user", "content": FILLER * tokens + QUESTION}], tools)
    return asked[: tokens // 2] + asked[tokens // 2 - tokens :]


def measure(folder: Path, prefix: list[int], asked: list[int], cfg: GrowthConfig) -> dict[str, Any]:
    """Time a fused model. To be run in its own process: the memory is the whole process's."""
    # As long as the call needs, which may be more than a server's; set in this process only.
    ort.BUFFER_TOKENS = len(prefix) + len(asked) + cfg.new_tokens + LONGEST_DRAFT
    runtime = ort.FusedRuntime(folder, cfg.threads, prefixes=1)
    for _ in range(cfg.warmup_calls):
        call(runtime, prefix, asked, cfg.new_tokens)
    made: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(made) < cfg.calls or time.perf_counter() - start < cfg.min_s:
        made.append(call(runtime, prefix, asked, cfg.new_tokens))
    return {
        "calls": len(made),
        "call_s": percentiles([total_s for _, total_s in made]),
        "first_token_s": percentiles([first_s for first_s, _ in made]),
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_bytes": int(psutil.Process().memory_info().rss),
    }


def _limits(folder: Path, variant: str, machine: Machine, lengths: Lengths) -> dict[str, float]:
    shape, model_bytes = Architecture.of(files.read_json(folder / "config.json")), _model_bytes(folder)
    return {
        "limit_call_s": limits.call_s(shape, machine, variant, model_bytes, lengths),
        "limit_memory_bytes": limits.memory_bytes(shape, model_bytes, lengths),
    }


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def by_clients(params: Params, machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant in QUANTIZED:
        folder = params.paths.models / FOLDERS[variant]
        shape, model_bytes = Architecture.of(files.read_json(folder / "config.json")), _model_bytes(folder)
        found[variant] = apart(answer_clients, folder, params)
        for row in found[variant]["by_clients"]:
            together = min(row["concurrency"], params.benchmark.together)
            asked = limits.Asked(**found[variant]["asked"])
            row["limits_calls_per_s"] = limits.calls_per_s(shape, machine, variant, model_bytes, asked, together)
        log.info("%s: %s", variant, [f"{row['calls_per_s']:.1f}/s" for row in found[variant]["by_clients"]])
    return found


class Counted:
    """A runtime that counts its steps, their tokens and the rows of logits kept."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.context_tokens = runtime, runtime.context_tokens
        self.steps = self.tokens = self.kept = 0

    def keeps(self, prefix: Sequence[int]) -> bool:
        return self._runtime.keeps(prefix)

    def begin(self, prefix: Sequence[int]) -> None:
        self._runtime.begin(prefix)

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        self.steps, self.tokens, self.kept = self.steps + 1, self.tokens + len(tokens), self.kept + keep
        return self._runtime.step(tokens, at, keep)


def answer_clients(folder: Path, params: Params) -> dict[str, Any]:
    """To be run in its own process: calls one by one, counting the model's work, then those of many clients."""
    paths, cfg, benchmark = params.paths, params.growth, params.benchmark

    use = replace(params.techniques, conversation_tokens=0)  # the same requests are repeated

    def load(together: int) -> ToolCaller:
        return ToolCaller.load(folder, paths.tools, "cpu", cfg.threads, use, together)

    rows = files.read_spread(paths.prepared / "test.jsonl", benchmark.requests)
    requests = [parse_request(value, (), where) for where, value in rows]
    random.Random(0).shuffle(requests)
    caller = load(1)
    for request in requests[: benchmark.warmup_calls]:
        ask(caller, request, benchmark)
    counted = Counted(caller.runtime)
    caller.runtime = counted
    alone = [ask(caller, request, benchmark).total_s for request in requests]
    engine = Engine(lambda: load(benchmark.together), max(cfg.clients), counted.context_tokens, benchmark.together)
    engine.wait_until_loaded()
    by_clients = [many_clients(engine, requests, clients, benchmark) for clients in cfg.clients]
    engine.stop()
    counts = {name: getattr(counted, name) / len(requests) for name in ("steps", "tokens", "kept")}
    return {"alone_s": percentiles(alone), "asked": counts, "together": benchmark.together, "by_clients": by_clients}


def by_size(params: Params, shapes: dict[str, Shape], machine: Machine) -> dict[str, Any]:
    from pipeline.speed import make_for_cpu  # PyTorch

    cfg = params.growth
    settings = {variant: params.quantize[variant] | PLAINLY for variant in QUANTIZED}
    found: dict[str, Any] = {variant: {"what": "speed only, random weights", "by_shape": []} for variant in QUANTIZED}
    lengths = Lengths(cfg.prefix_tokens, cfg.request_tokens, cfg.new_tokens)
    for name in cfg.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            log.info("making %s with random weights", name)
            apart(make_for_cpu, Path(scratch), params.paths.models / "base", shapes[name], settings)
            vocabulary = int(shapes[name].config["vocab_size"])
            tokens = np.random.default_rng(0).integers(1, vocabulary, lengths.prefix + lengths.asked).tolist()
            for variant in QUANTIZED:
                folder = Path(scratch) / variant
                made = apart(measure, folder, tokens[: lengths.prefix], tokens[lengths.prefix :], cfg)
                row = {
                    "shape": name,
                    "source": shapes[name].source,
                    "weights": Architecture.of(shapes[name].config).weights,
                    "model_bytes": _model_bytes(folder),
                }
                found[variant]["by_shape"].append(row | made | _limits(folder, variant, machine, lengths))
                log.info("%s %s: p50 %.0f ms", name, variant, 1e3 * made["call_s"]["p50"])
    return found


@config.main
def main(raw: DictConfig) -> None:
    run(config.load(raw, Params), SHAPES)


if __name__ == "__main__":
    main()

"""Stage `benchmark`: time and memory of whole calls, from the request to the parsed call.

Reads the variant's model and data/prepared/test.jsonl; writes reports/benchmark/{variant}.json and
the raw samples beside it. Compare variants only within one run on one machine. On CUDA: models/cuda and
reports/benchmark/cuda/{variant}.json, only after `evaluate` compared the variant's replies with the CPU's.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import cuda
from pipeline.bench.inputs import beside, inputs_sha256
from pipeline.bench.load import serve
from pipeline.bench.memory import peak_of_calls_bytes
from pipeline.bench.statistics import percentiles
from pipeline.provenance import provenance
from pipeline.runtime.caller import Reply, ToolCaller, load_runtime
from pipeline.runtime.generation import PLAIN, Choice, NullRuntime, Techniques, ablations
from pipeline.serving.engine import Asked, Engine
from pipeline.toolcall import score
from pipeline.toolcall.conversation import Request, parse_request

log = logging.getLogger(__name__)

FOLDERS = {"torch-fp32": "tuned", "onnx-fp32": "onnx", "fused-fp32": "fused", "int8": "int8", "int4": "int4"}
HELD = ("fused-fp32", "int8", "int4")  # use the grammar and all other techniques; the rest decode greedily
PREFILL_TOKENS = 256


@dataclass
class BenchmarkConfig:
    device: str  # auto: CUDA if ONNX Runtime offers it and the variant's model for it exists
    threads: int
    warmup_calls: int
    requests: int  # test requests to measure with, evenly spaced through the file
    min_s: float  # whole passes over them are repeated until this time is reached
    concurrency: list[int]
    calls_per_client: int
    together: int  # with many clients: requests decoded together, if the runtime can
    cuda_together: int  # the same on a GPU
    min_same_reply_fraction: float  # with many clients: share of replies equal to a single client's; below it, an error
    ablation_requests: int  # how many of `requests` measure the effect of each technique
    max_new_tokens: int

    def __post_init__(self) -> None:
        config.require_one_of("benchmark.device", self.device, ["auto", "cpu", "cuda"])
        config.require_range("benchmark.threads", self.threads, 1, 1024)
        config.require_range("benchmark.warmup_calls", self.warmup_calls, 0, 1000)
        config.require_range("benchmark.requests", self.requests, 1, 1_000_000)
        config.require_range("benchmark.min_s", self.min_s, 0, 86_400)
        config.require_range("benchmark.calls_per_client", self.calls_per_client, 1, 1000)
        config.require_range("benchmark.together", self.together, 1, 64)
        config.require_range("benchmark.cuda_together", self.cuda_together, 1, 64)
        config.require_range("benchmark.min_same_reply_fraction", self.min_same_reply_fraction, 0, 1)
        config.require_range("benchmark.ablation_requests", self.ablation_requests, 1, 1_000_000)
        config.require_range("benchmark.max_new_tokens", self.max_new_tokens, 2, 100_000)
        config.require_ranges("benchmark.concurrency", self.concurrency, 1, 10_000)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    techniques: Techniques
    benchmark: BenchmarkConfig

    def __post_init__(self) -> None:
        known = {"auto": FOLDERS | cuda.FOLDERS, "cpu": FOLDERS, "cuda": cuda.FOLDERS}[self.benchmark.device]
        config.require_one_of("variant", self.variant, list(known))


def run(paths: config.Paths, reports: Path, variant: str, techniques: Techniques, cfg: BenchmarkConfig) -> Any:
    requests_file = paths.prepared / "test.jsonl"
    device = choose_device(cfg.device, paths.models, variant)
    report = reports / f"{variant}.json" if device == "cpu" else reports / f"cuda/{variant}.json"
    folder = paths.models / (FOLDERS if device == "cpu" else cuda.FOLDERS)[variant]
    gpu = open_gpu(device)
    if gpu:
        cuda.require_evaluated(paths.reports / f"evaluate/cuda/{variant}.json", gpu.facts()["name"])
    some = [parse_request(value, (), where) for where, value in files.read_spread(requests_file, cfg.requests)]
    random.Random(0).shuffle(some)
    held = variant in HELD or variant in cuda.HELD
    log.info("%s on %s", variant, device)
    # The passes repeat the requests: with conversations kept, every pass but the first would find its prompts in cache.
    use = replace(techniques, conversation_tokens=0) if held else PLAIN
    model: dict[str, Any] = {
        "folder": folder,
        "tools": paths.tools,
        "device": device,
        "threads": cfg.threads,
        "techniques": use,
    }
    peak_rss = peak_of_calls_bytes(model, some, cfg.max_new_tokens)
    load = partial(ToolCaller.load, **model)
    # In a thread that ends: PyTorch's OpenMP has a team of threads per calling thread. With two teams on two processors
    # waiting threads sleep instead of spinning, and a call through the engine took twice the time.
    with watched(gpu) as alone, ThreadPoolExecutor(1) as thread:
        caller, load_s, requests, made = thread.submit(one_client, load, some, cfg).result()
    together = (cfg.cuda_together if gpu else cfg.together) if held else 1
    engine = Engine(partial(load, together=together), max(cfg.concurrency), caller.runtime.context_tokens, together)
    engine.wait_until_loaded()
    first = min(together, max(cfg.concurrency))
    many_clients(engine, requests[:first], first, cfg)  # warm-up of the new runtime
    by_concurrency = []
    for clients in cfg.concurrency:
        with watched(gpu) as busy:
            found = many_clients(engine, requests, clients, cfg, [reply.text for reply in made[: len(requests)]])
        by_concurrency.append(found)
        require_same_replies(variant, found, cfg.min_same_reply_fraction)
    engine.stop()
    weights = sum(p.stat().st_size for p in [*folder.glob("model.onnx*"), *folder.glob("*.safetensors")])
    limit_bytes_per_s = gpu.bandwidth_bytes_per_s() if gpu else read_bandwidth_bytes_per_s(cfg.threads)
    metrics: dict[str, Any] = {
        "variant": variant,
        "device": device,
        "model_bytes": weights,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss,
        **gpu_measures(alone, busy),
        "calls": len(made),
        "mean_new_tokens": float(np.mean([reply.new_tokens for reply in made])),
        "call_s": percentiles([reply.total_s for reply in made]),
        "first_token_s": percentiles([reply.first_token_s for reply in made]),
        "prefill_tokens_per_s": prefill_tokens_per_s(caller),
        "decode_tokens_per_s": 1 / (step_s := one_token_step_s(caller)),
        "step_s": step_s,
        "bandwidth_fraction": weights / step_s / limit_bytes_per_s,
        "harness_call_s": harness_call_s(caller, requests[0], cfg),
        "by_concurrency": by_concurrency,
        "ablation": ablation(caller, folder, device, requests, cfg) if held else [],
        "later": later(caller, folder, device, requests_file, techniques, cfg),
    }
    origin = provenance((techniques, cfg)) | {"inputs_sha256": inputs_sha256(requests_file, folder)}
    if gpu:
        origin["machine"]["gpu"] = gpu.facts()
    files.write_json(report.with_suffix(".samples.json"), {"call_s": [reply.total_s for reply in made]})
    files.write_json(report, metrics | {"provenance": origin})
    log.info("%s: p50 %.0f ms over %d calls", variant, 1e3 * metrics["call_s"]["p50"], len(made))
    return metrics


def choose_device(wanted: str, models: Path, variant: str) -> str:
    """Raises RuntimeError if CUDA is wanted but missing: a CPU's numbers must not pass for a GPU's."""
    offered = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if wanted == "cuda" and not offered:
        found = onnxruntime.get_available_providers()
        raise RuntimeError(f"benchmark.device is cuda, but ONNX Runtime offers only {found}")
    made = variant in cuda.FOLDERS and (models / cuda.FOLDERS[variant]).exists()
    return "cuda" if wanted == "cuda" or (wanted == "auto" and offered and made) else "cpu"


def open_gpu(device: str) -> Any:
    """A Gpu; None on the CPU, where NVML is not imported."""
    if device == "cpu":
        return None
    from pipeline.bench.gpu import Gpu

    return Gpu()


def watched(gpu: Any) -> AbstractContextManager[Any]:
    return gpu.watch() if gpu else nullcontext([])


def gpu_measures(alone: list[Any], busy: list[Any]) -> dict[str, Any]:
    if not alone:
        return {"gpu_peak_bytes": None, "gpu_utilisation_fraction": None}
    from pipeline.bench.gpu import measures

    return measures(alone, busy)


def ask(caller: ToolCaller, request: Request, cfg: BenchmarkConfig) -> Reply:
    return caller.reply(request.messages, request.tools, cfg.max_new_tokens)


def one_client(
    load: Callable[[], ToolCaller], some: list[Request], cfg: BenchmarkConfig
) -> tuple[ToolCaller, float, list[Request], list[Reply]]:
    """The loaded model, seconds to load it, the requests that fit its context, and the replies to them.

    Whole passes, so that the percentiles of every variant are over the same requests. Raises ValueError if none fits.
    """
    start = time.perf_counter()
    caller = load()
    load_s = time.perf_counter() - start
    requests = [r for r in some if caller.fits(r.messages, r.tools, cfg.max_new_tokens)]
    if not requests:
        raise ValueError(
            f"none of {len(some)} test requests fits the context of {caller.runtime.context_tokens} tokens"
        )
    for request in requests[: cfg.warmup_calls]:
        ask(caller, request, cfg)
    made: list[Reply] = []
    start = time.perf_counter()
    while not made or time.perf_counter() - start < cfg.min_s:
        made += [ask(caller, request, cfg) for request in requests]
    return caller, load_s, requests, made


def harness_call_s(caller: ToolCaller, request: Request, cfg: BenchmarkConfig) -> float:
    """Median time of a call without a model, its tokens known beforehand: our own share of a call's time."""
    ids = caller.tokenizer.encode(ask(caller, request, cfg).written, add_special_tokens=False)
    runtime = NullRuntime([*ids, caller.tokenizer.eos_token_id], len(caller.tokenizer))
    null = ToolCaller(runtime, caller.tokenizer, caller.tools, caller.techniques)
    return percentiles([ask(null, request, cfg).total_s for _ in range(100)])["p50"]


def many_clients(
    engine: Engine, requests: list[Request], clients: int, cfg: BenchmarkConfig, alone: Sequence[str] = ()
) -> dict[str, Any]:
    """Calls through the server's engine, without HTTP. `alone`: replies to a single client, to compare with: rounding
    can change replies that are decoded together.
    """
    new_tokens: list[int] = []
    same: list[bool] = []
    exact: list[bool] = []

    async def answer(number: int) -> None:
        request = requests[number % len(requests)]
        asked = Asked(tuple(request.messages), request.tools, Choice.AUTO, cfg.max_new_tokens, stream=False)
        piece = await engine.whole(asked)
        new_tokens.append(piece.new_tokens)
        if alone:
            same.append(piece.text == alone[number % len(requests)])
            outcome = score.outcome(piece.text, request.tools, request.expected, request.accept)
            exact.append(outcome == score.Outcome.EXACT)

    served = asyncio.run(serve(answer, clients, max(clients * cfg.calls_per_client, len(requests))))
    found = percentiles(served.call_s)
    return {
        "concurrency": clients,
        "calls_per_s": len(served.call_s) / served.wall_s,
        "new_tokens_per_s": sum(new_tokens) / served.wall_s,
        "p50_s": found["p50"],
        "p95_s": found["p95"],
        "error_fraction": served.errors / (served.errors + len(served.call_s)),
        **({"same_reply_fraction": float(np.mean(same)), "exact_call_fraction": float(np.mean(exact))} if same else {}),
    }


def require_same_replies(variant: str, found: dict[str, Any], least: float) -> None:
    """Raises RuntimeError if more replies differ than rounding explains: their speed means nothing."""
    same = found["same_reply_fraction"]
    if same < least:
        raise RuntimeError(
            f"{variant} gives the reply of one client to {found['concurrency']} on {same:.1%} of the calls; "
            f"benchmark.min_same_reply_fraction asks for {least:.1%}: nothing is written"
        )


def ablation(
    caller: ToolCaller, folder: Path, device: str, requests: list[Request], cfg: BenchmarkConfig
) -> list[dict[str, Any]]:
    """Calls without each technique; each request is asked in all ways before the next, so that conditions are equal.

    The order is random: a call that follows the slowest finds the processor's caches full of other data.
    """
    uncached = load_runtime(folder, device, cfg.threads, prefixes=0)
    callers = {
        name: ToolCaller(caller.runtime if use.prefixes else uncached, caller.tokenizer, caller.tools, use)
        for name, use in ablations(caller.techniques).items()
    }
    made: dict[str, list[Reply]] = {name: [] for name in callers}
    rng = random.Random(0)
    for request in [requests[0], *requests[: cfg.ablation_requests]]:
        for name in rng.sample(list(callers), len(callers)):
            made[name].append(ask(callers[name], request, cfg))
    written = [reply.written for reply in made["all"]]
    return [
        {
            "techniques": name,
            "call_p50_s": percentiles([reply.total_s for reply in replies[1:]])["p50"],  # the first warms up
            "same_reply_fraction": float(np.mean([a.written == b for a, b in zip(replies, written, strict=True)][1:])),
        }
        for name, replies in made.items()
    ]


def later(
    caller: ToolCaller, folder: Path, device: str, file: Path, techniques: Techniques, cfg: BenchmarkConfig
) -> dict[str, Any] | None:
    """The last call of a conversation, right after its earlier ones: `kept` reuses their KV cache, if the variant can;
    `anew` does not. None if there are no such requests.
    """
    rows = [found for path in (file, beside(file)) if path.exists() for found in files.read_jsonl(path)]
    some = [request for request in (parse_request(value, (), where) for where, value in rows) if request.messages[1:]]
    fitting = [r for r in some if caller.fits(r.messages, r.tools, cfg.max_new_tokens)]
    n = min(cfg.requests, len(fitting))
    requests = [fitting[at * len(fitting) // n] for at in range(n)]
    if not requests:
        return None
    callers = {"anew": caller}
    if device == "cpu" and caller.techniques != PLAIN and techniques.conversation_tokens:
        runtime = load_runtime(
            folder, device, cfg.threads, techniques.prefixes, conversation_tokens=techniques.conversation_tokens
        )
        callers["kept"] = ToolCaller(runtime, caller.tokenizer, caller.tools, caller.techniques)
    made: dict[str, list[Reply]] = {name: [] for name in callers}
    rng = random.Random(0)
    for request in [requests[-1], *requests]:
        for name in rng.sample(list(callers), len(callers)):
            for at, said in enumerate(request.messages):
                if said["role"] == "assistant":
                    callers[name].reply(request.messages[:at], request.tools, cfg.max_new_tokens)
            made[name].append(ask(callers[name], request, cfg))
    return {
        "requests": len(requests),
        "mean_prompt_tokens": float(np.mean([reply.prompt_tokens for reply in made["anew"][1:]])),
        **{
            f"{name}_call_s": percentiles([reply.total_s for reply in replies[1:]])  # the first warms up
            for name, replies in made.items()
        },
        "same_reply_fraction": float(np.mean([a.text == b.text for a, b in zip(*made.values(), strict=True)][1:]))
        if "kept" in made
        else None,
    }


def prefill_tokens_per_s(caller: ToolCaller) -> float:
    """Median of five prompts of random tokens, behind a one-token prefix that is already computed."""
    rng = np.random.default_rng(0)
    times = []
    for _ in range(5):
        prompt = rng.integers(0, len(caller.tokenizer), PREFILL_TOKENS).tolist()
        caller.runtime.begin([0])
        start = time.perf_counter()
        caller.runtime.step(prompt, 1, 1)
        times.append(time.perf_counter() - start)
    return PREFILL_TOKENS / float(np.median(times))


def one_token_step_s(caller: ToolCaller) -> float:
    """Median of 30 one-token steps after the prompt of `prefill_tokens_per_s`."""
    times = []
    for at in range(PREFILL_TOKENS + 1, PREFILL_TOKENS + 31):
        start = time.perf_counter()
        caller.runtime.step([0], at, 1)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """Best of five dot products per thread, each of its own two vectors of 128 MiB, too large for a cache. The weights
    are read once per token at this speed at most.
    """
    pairs = [(np.ones(32 * 2**20, np.float32), np.ones(32 * 2**20, np.float32)) for _ in range(threads)]
    times = []
    for _ in range(5):
        readers = [threading.Thread(target=np.dot, args=pair) for pair in pairs]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        times.append(time.perf_counter() - start)
    return sum(vector.nbytes for pair in pairs for vector in pair) / min(times)


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    paths = params.paths
    run(paths, paths.reports / "benchmark", params.variant, params.techniques, params.benchmark)


if __name__ == "__main__":
    main()

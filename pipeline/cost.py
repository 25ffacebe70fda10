"""Stage `cost`: what a million tokens, a thousand calls and a day's traffic cost, on a rented machine and hosted.

Reads reports/evaluate and reports/benchmark, also those of a GPU if they exist, and the prices in params.yaml; writes
reports/cost.json.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import gpu_section
from pipeline.bench.price import break_even, cascade, usd_per_million_tokens
from pipeline.provenance import provenance

log = logging.getLogger(__name__)

VARIANTS = ("torch-fp32", "onnx-fp32", "fused-fp32", "int8", "int4")
BASELINE = "torch-fp32"


@dataclass
class Machine:
    usd_per_hour: float
    provider: str
    date: str
    source: str
    gpus: list[str]  # NVML names that its one GPU may have; empty for a CPU machine


@dataclass
class Hosted:
    """A larger model behind an API. Its share of exact calls and its tokens per call are assumed."""

    model: str
    usd_per_million_input_tokens: float
    usd_per_million_output_tokens: float
    provider: str
    date: str
    source: str
    input_tokens_per_call: int
    output_tokens_per_call: int
    assumed_exact_fraction: float

    def __post_init__(self) -> None:
        for name in ("usd_per_million_input_tokens", "usd_per_million_output_tokens"):
            config.require_range(f"cost.hosted.{name}", getattr(self, name), 0, 1e6)
        for name in ("input_tokens_per_call", "output_tokens_per_call"):
            config.require_range(f"cost.hosted.{name}", getattr(self, name), 1, 10**7)
        config.require_range("cost.hosted.assumed_exact_fraction", self.assumed_exact_fraction, 0, 1)

    @property
    def usd_per_call(self) -> float:
        per_input = self.usd_per_million_input_tokens * self.input_tokens_per_call
        return (per_input + self.usd_per_million_output_tokens * self.output_tokens_per_call) / 1e6


@dataclass
class CostConfig:
    machine: str
    gpu_machine: str | None  # None: the machine that has the measured GPU
    machines: dict[str, Machine]
    utilisation: float
    utilisations: list[float]  # other values, for comparison
    p95_limit_s: float
    tokens_per_day: int
    hosted: Hosted
    thresholds: list[float]  # calls with a lower confidence go to the hosted model

    def __post_init__(self) -> None:
        on_gpu = self.gpu_machines()
        config.require_one_of("cost.machine", self.machine, [name for name in self.machines if name not in on_gpu])
        if self.gpu_machine is not None:
            config.require_one_of("cost.gpu_machine", self.gpu_machine, on_gpu)
        for name, machine in self.machines.items():
            config.require_range(f"cost.machines.{name}.usd_per_hour", machine.usd_per_hour, 1e-6, 1e6)
        for utilisation in (self.utilisation, *self.utilisations):
            config.require_range("cost.utilisation and cost.utilisations", utilisation, 0.001, 1)
        for threshold in self.thresholds:
            config.require_range("cost.thresholds", threshold, 0, 1)
        config.require_range("cost.p95_limit_s", self.p95_limit_s, 0.001, 86_400)
        config.require_range("cost.tokens_per_day", self.tokens_per_day, 1, 10**15)

    def gpu_machines(self) -> list[str]:
        return [name for name, machine in self.machines.items() if machine.gpus]


@dataclass
class Params:
    paths: config.Paths
    cost: CostConfig


def run(reports: Path, report: Path, cfg: CostConfig) -> dict[str, Any]:
    variants = price_all(reports, "", VARIANTS, cfg.machine, cfg)
    usd_per_call, usd_per_day = cfg.hosted.usd_per_call, 24 * cfg.machines[cfg.machine].usd_per_hour
    hosted = {
        **asdict(cfg.hosted),
        "usd_per_thousand_calls": 1000 * usd_per_call,
        "break_even_calls_per_day": usd_per_day / usd_per_call if usd_per_call else None,  # against one whole machine
    }
    metrics = {
        "utilisation": cfg.utilisation,
        "p95_limit_s": cfg.p95_limit_s,
        "tokens_per_day": cfg.tokens_per_day,
        "machine": facts(cfg.machine, cfg),
        "hosted": hosted,
        "variants": variants,
        "gpu_machines": [
            {**facts(name, cfg), "gpus": cfg.machines[name].gpus, "calls_per_s_to_pay": to_pay(name, variants, cfg)}
            for name in cfg.gpu_machines()
        ],
    }
    metrics |= on_gpu(reports, variants, cfg)
    files.write_json(report, metrics | {"provenance": provenance(cfg)})
    return metrics


def to_pay(gpu: str, variants: dict[str, dict[str, Any]], cfg: CostConfig) -> dict[str, float]:
    """Calls/s above which a call costs less on the GPU machine than with each variant on cost.machine.

    Both are equally busy. From prices and the CPU's speed alone: whether the GPU is that fast has to be measured.
    """
    ratio = cfg.machines[gpu].usd_per_hour / cfg.machines[cfg.machine].usd_per_hour
    return {name: ratio * found["most_calls_per_day"] / 86_400 for name, found in variants.items()}


def facts(machine: str, cfg: CostConfig) -> dict[str, Any]:
    found = {"name": machine, **asdict(cfg.machines[machine])}
    del found["gpus"]
    return found


def on_gpu(reports: Path, cpu_variants: dict[str, dict[str, Any]], cfg: CostConfig) -> dict[str, Any]:
    """Prices on a GPU machine, and break-even with every variant on a CPU; empty if no GPU was measured."""
    measured = gpu_section.read(reports)["benchmark"]
    if not measured:
        return {}
    machine = gpu_machine(next(iter(measured.values()))["provenance"]["machine"]["gpu"]["name"], cfg)
    variants = price_all(reports, "cuda", list(measured), machine, cfg)

    def one(name: str, found: dict[str, Any]) -> tuple[float, float]:
        return cfg.machines[name].usd_per_hour, found["most_calls_per_day"] * cfg.utilisation

    return {
        "gpu_machine": facts(machine, cfg),
        "gpu_variants": variants,
        "gpu_break_even": {
            "utilisation": cfg.utilisation,
            "variants": {
                name: {cpu: break_even(*one(cfg.machine, of), *one(machine, found)) for cpu, of in cpu_variants.items()}
                for name, found in variants.items()
            },
        },
    }


def gpu_machine(gpu: str, cfg: CostConfig) -> str:
    """cost.gpu_machine; if that is empty, the machine that lists exactly the name `gpu` in its gpus.

    Raises ValueError unless one machine does: a part of a GPU, or a slower kind, has another price.
    """
    if cfg.gpu_machine is not None:
        return cfg.gpu_machine
    fitting = [name for name, machine in cfg.machines.items() if gpu in machine.gpus]
    if len(fitting) != 1:
        raise ValueError(
            f"reports/benchmark/cuda is of {gpu!r}, which {len(fitting)} of cost.machines name among their gpus; "
            f"cost.gpu_machine must be one of {fitting or cfg.gpu_machines()}"
        )
    return fitting[0]


def price_all(
    reports: Path, device: str, names: Sequence[str], machine: str, cfg: CostConfig
) -> dict[str, dict[str, Any]]:
    """`device`: subfolder in reports/evaluate and reports/benchmark. Savings are against BASELINE there."""
    evaluated, measured = reports / "evaluate" / device, reports / "benchmark" / device
    variants = {
        name: price(
            files.read_json(measured / f"{name}.json"),
            files.read_json(evaluated / f"{name}.json"),
            [row for _, row in files.read_jsonl(evaluated / f"{name}.replies.jsonl") if not row["apart"]],
            cfg.machines[machine].usd_per_hour,
            cfg,
        )
        for name in names
    }
    baseline = variants[BASELINE]["usd_per_million_tokens"] if BASELINE in variants else None
    for found in variants.values():
        found["savings_fraction"] = 1 - found["usd_per_million_tokens"] / baseline if baseline else None
    return variants


def price(
    benchmark: dict[str, Any],
    evaluate: dict[str, Any],
    replies: list[dict[str, Any]],
    per_hour: float,
    cfg: CostConfig,
) -> dict[str, Any]:
    """Prices at the number of clients with the most calls/s among those whose p95 is within cost.p95_limit_s.

    If none is, at the fewest clients, and `within_p95_limit` is false. Calls and tokens are charged their share of a
    machine's price, a day's traffic the price of as many whole machines as it needs.
    """
    levels = benchmark["by_concurrency"]
    within = [level for level in levels if level["p95_s"] <= cfg.p95_limit_s]
    fewest = min(levels, key=lambda level: int(level["concurrency"]))
    level = max(within, key=lambda level: float(level["calls_per_s"])) if within else fewest
    per_million = usd_per_million_tokens(per_hour, level["new_tokens_per_s"], cfg.utilisation)
    per_thousand = per_hour / (level["calls_per_s"] * cfg.utilisation * 3600) * 1000
    exact, hosted = evaluate["exact_call_fraction"], cfg.hosted
    machines = math.ceil(cfg.tokens_per_day / (level["new_tokens_per_s"] * cfg.utilisation * 86_400))
    per_day = machines * 24 * per_hour
    return {
        "concurrency": level["concurrency"],
        "within_p95_limit": bool(within),
        "usd_per_million_tokens": per_million,
        "usd_per_thousand_calls": per_thousand,
        "usd_per_thousand_correct_calls": per_thousand / exact if exact else None,
        "machines": machines,
        "usd_per_day": per_day,
        "usd_per_month": per_day * 365.25 / 12,
        "usd_per_year": per_day * 365.25,
        "usd_per_thousand_calls_at_utilisation": {
            str(utilisation): per_thousand * cfg.utilisation / utilisation for utilisation in cfg.utilisations
        },
        "cascade": {
            str(threshold): cascade(
                replies,
                threshold,
                (per_thousand / 1000, hosted.usd_per_call),
                per_hour,
                hosted.assumed_exact_fraction,
            )
            for threshold in cfg.thresholds
        },
        "most_calls_per_day": level["calls_per_s"] * 86_400,
    }


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.paths.reports / "cost.json", params.cost)


if __name__ == "__main__":
    main()

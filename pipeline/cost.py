"""Stage `cost`: what a million tokens, a thousand calls and a day's traffic cost, on a rented machine and hosted.

Reads reports/evaluate, reports/benchmark and the prices in params; writes reports/cost.json.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench.price import cascade, usd_per_million_tokens
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


@dataclass
class Hosted:
    """A larger model behind somebody's API. How often it is right is assumed, and the tokens of a call are too."""

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
    machines: dict[str, Machine]
    utilisation: float
    utilisations: list[float]  # beside it, to see what hangs on it
    p95_limit_s: float
    tokens_per_day: int
    hosted: Hosted
    thresholds: list[float]  # of confidence, below which a call is sent to the hosted model

    def __post_init__(self) -> None:
        config.require_one_of("cost.machine", self.machine, list(self.machines))
        for utilisation in (self.utilisation, *self.utilisations):
            config.require_range("cost.utilisation and cost.utilisations", utilisation, 0.001, 1)
        for threshold in self.thresholds:
            config.require_range("cost.thresholds", threshold, 0, 1)
        config.require_range("cost.p95_limit_s", self.p95_limit_s, 0.001, 86_400)
        config.require_range("cost.tokens_per_day", self.tokens_per_day, 1, 10**15)


@dataclass
class Params:
    paths: config.Paths
    cost: CostConfig


def run(reports: Path, report: Path, cfg: CostConfig) -> dict[str, Any]:
    variants = {
        name: price(
            files.read_json(reports / "benchmark" / f"{name}.json"),
            files.read_json(reports / "evaluate" / f"{name}.json"),
            [row for _, row in files.read_jsonl(reports / "evaluate" / f"{name}.replies.jsonl")],
            cfg,
        )
        for name in VARIANTS
    }
    baseline = variants[BASELINE]["usd_per_million_tokens"]
    for found in variants.values():
        found["savings_fraction"] = 1 - found["usd_per_million_tokens"] / baseline
    hosted = {**asdict(cfg.hosted), "usd_per_thousand_calls": 1000 * cfg.hosted.usd_per_call}
    machine = {"name": cfg.machine, **asdict(cfg.machines[cfg.machine])}
    metrics = {"machine": machine, "hosted": hosted, "variants": variants}
    files.write_json(report, metrics | {"provenance": provenance(cfg)})
    return metrics


def price(
    benchmark: dict[str, Any], evaluate: dict[str, Any], replies: list[dict[str, Any]], cfg: CostConfig
) -> dict[str, Any]:
    """At the number of clients with the most calls a second whose p95 is within cost.p95_limit_s.

    Where none is within, at the fewest clients; `within_p95_limit` says so.
    """
    levels = benchmark["by_concurrency"]
    within = [level for level in levels if level["p95_s"] <= cfg.p95_limit_s]
    fewest = min(levels, key=lambda level: int(level["concurrency"]))
    level = max(within, key=lambda level: float(level["calls_per_s"])) if within else fewest
    per_hour = cfg.machines[cfg.machine].usd_per_hour
    per_million = usd_per_million_tokens(per_hour, level["new_tokens_per_s"], cfg.utilisation)
    per_thousand = per_hour / (level["calls_per_s"] * cfg.utilisation * 3600) * 1000
    exact, hosted = evaluate["exact_call_fraction"], cfg.hosted
    per_day = per_million * cfg.tokens_per_day / 1e6
    return {
        "concurrency": level["concurrency"],
        "within_p95_limit": bool(within),
        "usd_per_million_tokens": per_million,
        "usd_per_thousand_calls": per_thousand,
        "usd_per_thousand_correct_calls": per_thousand / exact if exact else None,
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


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.paths.reports / "cost.json", params.cost)


if __name__ == "__main__":
    main()

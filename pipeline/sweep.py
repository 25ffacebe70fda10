"""Sweeps over quantization settings: each trial quantizes, scores and times in a folder of its own.

    python -m pipeline.sweep -m sweep.name=blocks variant=int4 quantize.int4.block_size=16,32,64

Hydra's sweeper makes the trials from the command line, and its launcher runs them, here or on other machines that
share this folder. Reads models/fused and models/tuned; writes reports/sweeps/NAME/: one folder per trial, trials.csv,
pareto.png and verdict.txt. Calls are scored on the hand-written validation requests: a setting chosen on the test
requests would look better than it is.
A trial already done with the same settings, inputs and CPU model, in this sweep or another, is not repeated; a failed
trial does not stop the others. Only trials with the current models and requests on the last trial's CPU model are
compared: others, such as those from before a training, keep their folders but are left out of trials.csv.
"""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pipeline import config, files, provenance
from pipeline.bench import pareto

log = logging.getLogger(__name__)

STAGES = ("quantize", "evaluate", "benchmark")
READ = ("fused", "tuned")  # models that a trial reads
SETTINGS = ("quantize", "techniques", "evaluate", "benchmark")
# trials are compared only by the calls of a single client
QUICK = ["benchmark.concurrency=[1]", "benchmark.ablation_requests=1"]
MACHINE = Path(tempfile.gettempdir()) / f"tool-caller-sweep-{os.getuid()}.lock"


@dataclass
class SweepConfig:
    name: str
    requests: Path  # to count exact calls on
    max_loss_fraction: float  # exact-call fraction that the recommended trial may lose against the best

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"sweep.name must be a plain name, got {self.name!r}")
        config.require_range("sweep.max_loss_fraction", self.max_loss_fraction, 0, 1)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    sweep: SweepConfig

    def __post_init__(self) -> None:
        config.require_one_of("variant", self.variant, ["int8", "int4"])


def run(params: Params, settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Run one trial, unless it was done before; returns its row in trials.csv. `settings`: those of its stages."""
    sweep = params.paths.reports / "sweeps" / params.sweep.name
    shared = {"inputs_sha256": inputs_sha256(params), "machine": provenance.machine()["cpu"]}
    folder = sweep / trial_id(params.variant, settings, shared)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock") as lock:
        done = folder / "trial.json"
        row = done_before(sweep.parent, folder.name)
        if row:
            log.info("%s was done before", folder.name)
        else:
            row = {"trial": folder.name, "overrides": " ".join(overrides), "commit": provenance.commit(), **shared}
            row |= trial(params, folder, overrides, lock)
        if not done.exists() or files.read_json(done) != row:
            files.write_json(done, row)
    with held(sweep / ".lock"):
        summarize(sweep, shared, params.sweep.max_loss_fraction)
    return row


def done_before(sweeps: Path, trial: str) -> dict[str, Any] | None:
    """The row of this trial, if it succeeded in any sweep."""
    rows = (dict(files.read_json(path)) for path in sorted(sweeps.glob(f"*/{trial}/trial.json")))
    return next((row for row in rows if row["error"] is None), None)


def inputs_sha256(params: Params) -> str:
    """Hash of the models that a trial reads, the tools and the requests."""
    paths = params.paths
    models = [path for name in READ for path in sorted((paths.models / name).glob("model.*"))]
    requests = [paths.prepared / f"{name}.jsonl" for name in ("train", "validation-hand", "test")]
    hashes = [files.sha256(path) for path in [*models, paths.tools, params.sweep.requests, *requests]]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def trial_id(variant: str, settings: dict[str, Any], shared: dict[str, str]) -> str:
    """Equal trials have equal ids. `shared`: the inputs and CPU that comparable trials have in common."""
    text = json.dumps({"variant": variant, "settings": settings} | shared, sort_keys=True, default=str)
    return f"{variant}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def held(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Wait for the lock and hold it. A child process that inherits the descriptor keeps it if it outlives this one."""
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another trial to release %s", path)
            fcntl.flock(lock, how)
        yield lock.fileno()


def trial(params: Params, folder: Path, overrides: list[str], lock: int) -> dict[str, Any]:
    """Run the stages in turn, each in its own process, because the benchmark reads its process's peak memory.

    A benchmark has the machine to itself: it waits for the stages of other trials, and they for it.
    """
    models = folder / "models"
    models.mkdir(exist_ok=True)
    for name in READ:
        if not (models / name).is_symlink():
            (models / name).symlink_to((params.paths.models / name).resolve(), target_is_directory=True)
    own = [f"variant={params.variant}", f"paths.models={models}", f"paths.reports={folder}"]
    given = [*QUICK, *(override for override in overrides if not override.startswith(("sweep.", "variant=")))]
    environment = os.environ | {"HYDRA_FULL_ERROR": "1"}  # makes the last line the error itself
    took_s = 0.0
    for stage in STAGES:
        more = [f"evaluate.requests={params.sweep.requests}"] if stage == "evaluate" else []
        command = [sys.executable, "-m", f"pipeline.{stage}", *given, *own, *more]
        with held(MACHINE, fcntl.LOCK_EX if stage == "benchmark" else fcntl.LOCK_SH) as machine:
            start = time.perf_counter()
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, check=False, env=environment, pass_fds=(lock, machine)
            )
            took_s += time.perf_counter() - start
        (folder / f"{stage}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            log.warning("%s: %s failed: %s", folder, stage, lines[-1])
            return {"error": f"{stage}: {lines[-1]}"}
    quantize, evaluate, benchmark = (files.read_json(folder / stage / f"{params.variant}.json") for stage in STAGES)
    return {
        "error": None,
        "exact_call_fraction": evaluate["exact_call_fraction"],
        "p50_s": benchmark["call_s"]["p50"],
        "model_bytes": quantize["model_bytes"],
        "kl_divergence": quantize["kl_divergence"],
        "same_token_fraction": quantize["same_token_fraction"],
        "peak_rss_bytes": benchmark["peak_rss_bytes"],
        "trial_s": took_s,
    }


def summarize(sweep: Path, shared: dict[str, str], max_loss_fraction: float) -> None:
    """Write trials.csv of the trials with these inputs and CPU; if one succeeded, also pareto.png and verdict.txt."""
    found = [files.read_json(path) for path in sorted(sweep.glob("*/trial.json"))]
    rows = [row for row in found if shared.items() <= row.items()]
    if len(rows) < len(found):
        log.info("%s: left out %d trials of other inputs or another CPU", sweep, len(found) - len(rows))
    table = pareto.ranked(pd.DataFrame(rows), max_loss_fraction)
    files.write_text(sweep / "trials.csv", table.to_csv(index=False))
    if table["error"].isna().any():
        pareto.plot(table, sweep / "pareto.png")
        verdict = pareto.verdict(table, max_loss_fraction)
        files.write_text(sweep / "verdict.txt", f"{verdict}\n")
        log.info("%s", verdict)
    else:  # existing ones show trials that are now left out
        for name in ("pareto.png", "verdict.txt"):
            (sweep / name).unlink(missing_ok=True)


def require_effect(variant: str, overrides: Sequence[str], unread: Sequence[str]) -> None:
    """Raises ValueError for an override that no stage of a trial reads: every trial would repeat the first."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in (*SETTINGS, "paths", "sweep", "variant") or key.startswith(tuple(unread)):
            raise ValueError(f"{key} has no effect on a trial of {variant}: its stages are {', '.join(STAGES)}")


def objectives(raw: DictConfig) -> tuple[float, float, float] | None:
    """The objectives of Hydra's Optuna sweeper: exact-call fraction, seconds, bytes.

    None if the trial failed: the sweeper then records the failure and goes on, which it would not after an exception.
    """
    os.chdir(HydraConfig.get().runtime.cwd)  # a launcher's worker starts elsewhere
    params = config.load(raw, Params)
    settings: Any = OmegaConf.to_container(raw, resolve=True)
    read = {name: settings[name] for name in SETTINGS}
    others = {"int8", "int4"} - {params.variant} | ({"cuda"} if read["quantize"]["device"] == "cpu" else set())
    read["quantize"] = {key: value for key, value in read["quantize"].items() if key not in others}
    overrides = list(HydraConfig.get().overrides.task)
    require_effect(params.variant, overrides, [f"quantize.{name}." for name in others])
    row = run(params, read, overrides)
    log.info("%s", {key: row.get(key) for key in ("overrides", "error", "exact_call_fraction", "p50_s")})
    return None if row["error"] else (row["exact_call_fraction"], row["p50_s"], row["model_bytes"])


@config.main
def main(raw: DictConfig) -> tuple[float, float, float] | None:
    from pipeline import sweep  # a launcher's worker gets only this function: Params is not usable there

    return sweep.objectives(raw)


if __name__ == "__main__":
    main()

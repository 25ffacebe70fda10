"""The report's section on a GPU, where its reports exist."""

from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import files
from pipeline.bench.cuda import FOLDERS
from pipeline.bench.inputs import REQUESTS, differing
from pipeline.bench.price import usd_per_million_tokens

BASELINE = "torch-fp32"


def read(reports: Path) -> dict[str, Any]:
    """The reports of the stages of pipeline/cuda/dvc.yaml: by variant, and by shape under `speed`.

    `withheld`: the evaluate reports of variants that failed the gate; nothing else of them is shown. `unmeasured`: the
    names of variants that passed it but have no benchmark.

    Raises ValueError where variants were measured on different GPUs, with different settings, or one of them with
    another model or other requests than it was scored with.
    """
    evaluated, measured = reports / "evaluate/cuda", reports / "benchmark/cuda"
    scored = {n: files.read_json(evaluated / f"{n}.json") for n in FOLDERS if (evaluated / f"{n}.json").exists()}
    withheld = {name: of for name, of in scored.items() if of["withheld"]}
    passed = [name for name in scored if name not in withheld]
    names = [name for name in passed if (measured / f"{name}.json").exists()]
    found: dict[str, Any] = {
        "withheld": withheld,
        "unmeasured": [name for name in passed if name not in names],
        "evaluate": {name: scored[name] for name in names},
        "benchmark": {name: files.read_json(measured / f"{name}.json") for name in names},
        "speed": [files.read_json(path) for path in sorted((measured / "speed").glob("*.json"))],
    }
    runs = {
        (bench["provenance"]["settings_sha256"], bench["provenance"]["machine"]["gpu"]["name"])
        for bench in found["benchmark"].values()
    }
    for name in names:
        if differ := differing(scored[name], found["benchmark"][name], ("model", *REQUESTS)):
            raise ValueError(
                f"{measured}/{name}.json is of another {' and '.join(differ)} than {evaluated}/{name}.json; "
                "dvc repro pipeline/cuda/dvc.yaml makes them anew"
            )
    if len(runs) > 1:
        raise ValueError(
            f"{measured} is of different runs (settings or GPUs): {', '.join(names)}; "
            "dvc repro -f pipeline/cuda/dvc.yaml makes them anew"
        )
    gpus = {gpu for _, gpu in runs}.union(*map(_gpus, found["speed"]))
    if len(gpus) > 1:
        raise ValueError(
            f"{measured} and its speed/ are of different GPUs: {', '.join(sorted(gpus))}; "
            "dvc repro -f pipeline/cuda/dvc.yaml makes them anew"
        )
    return found


def markdown(found: dict[str, Any], cost: dict[str, Any], on_cpu: str) -> list[str]:
    """The section's paragraphs; none if no GPU was measured. `on_cpu`: the CPU variant to compare costs with.

    Raises ValueError where `cost` (reports/cost.json) is from before the GPU was measured.
    """
    parts = ["## On a GPU"] if any(found[kind] for kind in ("benchmark", "withheld", "unmeasured")) else []
    if found["benchmark"]:
        unpriced = [name for name in found["benchmark"] if name not in cost.get("gpu_variants", {})]
        if unpriced:
            raise ValueError(
                f"reports/cost.json has no price on a GPU for {', '.join(unpriced)}; dvc repro -f -s cost makes them"
            )
        columns = ladder(found, cost).set_index("variant").T  # transposed to fit a page
        parts += [
            str(columns.to_markdown(disable_numparse=True)),
            _how(found),
            _break_even(found, cost, on_cpu),
        ]
    parts += [
        f"Withheld: on {of['gpu']}, {name} gives the CPU's reply on {of['same_reply_fraction_vs_cpu']:.1%} of the "
        f"requests; {of['min_same_reply_fraction']:.1%} are required."
        for name, of in found["withheld"].items()
    ]
    if found["unmeasured"]:
        parts += [f"Not measured: {', '.join(found['unmeasured'])}; dvc repro pipeline/cuda/dvc.yaml says why."]
    if found["speed"]:
        parts += ["## Other model sizes on a GPU: speed only, random weights"]
        for shape in found["speed"]:
            where = f"on {', '.join(sorted(_gpus(shape)))}"
            parts += [f"{shape['shape']} (`{shape['source']}`), {where}:", _table(speed(shape, cost))]
        said = "PyTorch answers one request at a time, regardless of the number of clients."
        if "gpu_machine" in cost:
            machine, utilisation = cost["gpu_machine"], cost["gpu_break_even"]["utilisation"]
            said += (
                " A million generated tokens is priced at the number of clients with the most calls/s, on "
                f"{machine['name']} at {machine['usd_per_hour']} USD per hour, busy {utilisation:.0%} of it."
            )
        parts += [said]
    return parts


def ladder(found: dict[str, Any], cost: dict[str, Any]) -> pd.DataFrame:
    base = found["benchmark"].get(BASELINE)
    rows = []
    for name, bench in found["benchmark"].items():
        scored, priced = found["evaluate"][name], cost["gpu_variants"][name]
        correct = priced["usd_per_thousand_correct_calls"]
        low, high = scored["exact_call_ci95"]
        rows.append(
            {
                "variant": name,
                "exact calls": f"{scored['exact_call_fraction']:.1%} ({low:.1%} to {high:.1%})",
                "same reply as CPU": f"{scored['same_reply_fraction_vs_cpu']:.1%}",
                **{f"{p} ms": f"{1e3 * bench['call_s'][p]:.1f}" for p in ("p50", "p95", "p99")},
                "faster": f"{base['call_s']['p50'] / bench['call_s']['p50']:.2f}x" if base else "",
                **{f"calls/s at {row['concurrency']}": f"{row['calls_per_s']:.1f}" for row in bench["by_concurrency"]},
                "MB on disk": f"{bench['model_bytes'] / 1e6:.0f}",
                "GPU peak MB": f"{bench['gpu_peak_bytes'] / 1e6:.0f}",
                "GPU busy": _share(bench["gpu_utilisation_fraction"]),
                "W": "" if bench["gpu_power_w"] is None else f"{bench['gpu_power_w']:.0f}",
                "memory bandwidth used": f"{bench['bandwidth_fraction']:.1%}",
                "USD per million tokens": f"{priced['usd_per_million_tokens']:.3f}",
                "USD per 1,000 exact calls": "" if correct is None else f"{correct:.4f}",
            }
        )
    return pd.DataFrame(rows)


def speed(shape: dict[str, Any], cost: dict[str, Any]) -> pd.DataFrame:
    base = shape["variants"][BASELINE]

    def usd(made: dict[str, Any]) -> str:
        if "gpu_machine" not in cost:
            return ""
        tokens_per_s = shape["new_tokens"] * max(made["calls_per_s"].values())
        per_hour, utilisation = cost["gpu_machine"]["usd_per_hour"], cost["gpu_break_even"]["utilisation"]
        return f"{usd_per_million_tokens(per_hour, tokens_per_s, utilisation):.3f}"

    rows = [
        {
            "variant": name,
            "p50 ms": f"{1e3 * made['call_s']['p50']:.1f}",
            "p95 ms": f"{1e3 * made['call_s']['p95']:.1f}",
            "p99 ms": f"{1e3 * made['call_s']['p99']:.1f}",
            "faster": f"{base['call_s']['p50'] / made['call_s']['p50']:.2f}x",
            "tokens/s": f"{made['decode_tokens_per_s']:.0f}",
            **{f"calls/s at {n}": f"{found:.1f}" for n, found in made["calls_per_s"].items()},
            "MB on disk": f"{made['model_bytes'] / 1e6:.0f}",
            "GPU peak MB": "" if made["gpu_peak_bytes"] is None else f"{made['gpu_peak_bytes'] / 1e6:.0f}",
            "GPU busy": _share(made.get("gpu_utilisation_fraction")),
            "USD per million tokens": usd(made),
        }
        for name, made in ((name, shape["variants"][name]) for name in FOLDERS if name in shape["variants"])
    ]
    return pd.DataFrame(rows)


def _gpus(shape: dict[str, Any]) -> set[str]:
    return {made["gpu"]["name"] if made["gpu"] else "a CPU" for made in shape["variants"].values()}


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _how(found: dict[str, Any]) -> str:
    gpu = next(iter(found["benchmark"].values()))["provenance"]["machine"]["gpu"]
    return (
        f"{gpu['name']}, driver {gpu['driver']}, clocks up to {gpu['max_sm_clock_hz'] / 1e6:.0f} MHz (memory "
        f"{gpu['max_memory_clock_hz'] / 1e6:.0f} MHz). torch-fp32 is PyTorch eager, torch-fp16 has compiled steps and "
        "a static cache; both decode token by token. The others have all techniques, and float16 activations: dynamic "
        "INT8 has no CUDA kernels. Every variant's replies were compared with the CPU's before it was measured. GPU "
        "memory: this process's, with one client. GPU busy and W: means with the most clients. PyTorch's requests "
        "queue; with the others up to `benchmark.cuda_together` are decoded together."
    )


def _break_even(found: dict[str, Any], cost: dict[str, Any], on_cpu: str) -> str:
    fastest = min(found["benchmark"], key=lambda name: float(found["benchmark"][name]["call_s"]["p50"]))
    cpu, gpu = cost["machine"], cost["gpu_machine"]
    at = cost["gpu_break_even"]["variants"][fastest][on_cpu]
    if at["calls_per_day"] is None:
        needed = at["cpu_machines_for_gpu_calls"]
        how = (
            f"never costs less: {needed} {cpu['name']} are enough for all {at['gpu_calls_per_day']:,.0f} calls/day it "
            f"can answer, at {needed * cpu['usd_per_hour']:.2f} USD per hour."
        )
    else:
        how = (
            f"costs less above {at['calls_per_day']:,.0f} calls/day, where {at['cpu_machines']} or more {cpu['name']} "
            f"are needed; it answers up to {at['gpu_calls_per_day']:,.0f}."
        )
    return (
        f"Price: {gpu['name']} at {gpu['usd_per_hour']} USD per hour ({gpu['provider']}, {gpu['date']}: "
        f"{gpu['source']}). Break-even of its fastest variant (p50), {fastest}, vs {on_cpu} on {cpu['name']} at "
        f"{cpu['usd_per_hour']} USD per hour: one {gpu['name']} {how} Every machine is rented all day and busy "
        f"{cost['gpu_break_even']['utilisation']:.0%} of it; all calls count, exact or not."
    )


def _table(table: pd.DataFrame) -> str:
    return str(table.to_markdown(index=False, disable_numparse=True))

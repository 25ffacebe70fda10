"""The stages as they run on a GPU, as far as a CPU allows: models for CUDA, NVML as a fake, the CPU as the device."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pipeline import benchmark, config, evaluate, export, files, quantize
from pipeline.bench import cuda, memory
from pipeline.bench.gpu import Gpu
from pipeline.runtime import caller
from pipeline.runtime.caller import Reply, ToolCaller
from pipeline.runtime.generation import ALL
from tests.bench.test_gpu import Nvml

ROOT = Path(__file__).parents[1]


def load(schema: type, *changes: str) -> Any:
    raw = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(ROOT / "tests/smoke.yaml"))
    return config.load(OmegaConf.merge(raw, OmegaConf.from_dotlist(list(changes))), schema)  # type: ignore[arg-type]


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> config.Paths:
    """A project with models/tuned and models/cuda/fused-fp16."""
    from pipeline.model.onnx_export import export_fused

    fused = tmp_path / "models/cuda/fused-fp16"
    fused.mkdir(parents=True)
    export_fused(tiny_base, fused, "cuda")
    (tmp_path / "models/tuned").symlink_to(tiny_base, target_is_directory=True)
    hand = (ROOT / "data/requests/test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    tools = files.read_json(ROOT / "data/tools.json")
    for name in ("test", "train", "validation-hand"):
        rows = [json.loads(line) | {"tools": tools} for line in hand]
        files.write_jsonl(tmp_path / f"prepared/{name}.jsonl", rows)
    folders = (tmp_path / name for name in ("keywords.json", "requests", "prepared", "models", "reports"))
    return config.Paths(ROOT / "data/tools.json", *folders)


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = caller.load_runtime

    def load_runtime(folder: Path, _device: str, *rest: Any, **more: Any) -> Any:
        return made(folder, "cpu", *rest, **more)

    monkeypatch.setattr(caller, "load_runtime", load_runtime)
    monkeypatch.setattr(benchmark, "load_runtime", load_runtime)
    on_cpu = memory.peak_of_calls_bytes
    monkeypatch.setattr(
        benchmark, "peak_of_calls_bytes", lambda model, *rest: on_cpu({**model, "device": "cpu"}, *rest)
    )
    monkeypatch.setattr(benchmark, "choose_device", lambda *_: "cuda")
    monkeypatch.setattr(benchmark, "open_gpu", lambda _: Gpu(Nvml()))
    monkeypatch.setattr(evaluate, "gpu_name", lambda: "NVIDIA H100")


def scored(paths: config.Paths) -> dict[str, Any]:
    changes = "evaluate.device=cuda", f"evaluate.requests={paths.prepared}/test.jsonl", "variant=fused-fp16"
    params = load(evaluate.Params, *changes)
    out = paths.reports / "evaluate/cuda/fused-fp16.json"
    return evaluate.run(paths, out, "fused-fp16", ALL, params.evaluate)


def test_share_of_same_replies() -> None:
    assert cuda.same_reply_fraction(["a", "b", "c", "d"], ["a", "b", "C", "d"]) == 0.75
    cuda.require_parity("int8", 0.99, 0.99)
    with pytest.raises(RuntimeError, match=r"int8 gives the CPU's reply on 98\.90% .*asks for 99\.00%"):
        cuda.require_parity("int8", 0.989, 0.99)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_gpu_reports_are_written_beside_the_cpu_ones(paths: config.Paths) -> None:
    assert scored(paths)["same_reply_fraction_vs_cpu"] == 1.0
    cfg = load(benchmark.Params, "benchmark.device=cuda", "variant=fused-fp16").benchmark
    benchmark.run(paths, paths.reports / "benchmark", "fused-fp16", ALL, cfg)
    found = files.read_json(paths.reports / "benchmark/cuda/fused-fp16.json")
    assert (found["device"], found["gpu_utilisation_fraction"], found["gpu_power_w"]) == ("cuda", 0.4, 350.0)
    assert found["provenance"]["machine"]["gpu"]["name"] == "NVIDIA H100"
    assert [level["same_reply_fraction"] for level in found["by_concurrency"]] == [1.0, 1.0]
    assert (paths.reports / "benchmark/cuda/fused-fp16.samples.json").exists()
    assert not (paths.reports / "benchmark/fused-fp16.json").exists()


@pytest.mark.usefixtures("cpu_as_gpu")
def test_no_number_is_written_where_replies_differ(paths: config.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault on Hopper GPUs: deterministic garbage, while the CPU is clean."""
    scored(paths)  # an earlier run that passed
    reply, devices = ToolCaller.reply, iter(["cuda"] * 3 + ["cpu"] * 3)

    def garbage(self: ToolCaller, *arguments: Any) -> Reply:
        made = reply(self, *arguments)
        return dataclasses.replace(made, text="!!!") if next(devices) == "cuda" else made

    monkeypatch.setattr(ToolCaller, "reply", garbage)
    with pytest.raises(RuntimeError, match=r"fused-fp16 gives the CPU's reply on 0\.00% of the requests"):
        scored(paths)
    found = files.read_json(paths.reports / "evaluate/cuda/fused-fp16.json")
    assert (found["withheld"], found["same_reply_fraction_vs_cpu"]) == (True, 0.0)
    assert "exact_call_fraction" not in found
    assert not (paths.reports / "evaluate/cuda/fused-fp16.replies.jsonl").exists()
    cfg = load(benchmark.Params, "benchmark.device=cuda", "variant=fused-fp16").benchmark
    with pytest.raises(RuntimeError, match=r"fused-fp16 gives the CPU's reply on 0\.00% of the requests"):
        benchmark.run(paths, paths.reports / "benchmark", "fused-fp16", ALL, cfg)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_gpu_is_measured_only_where_it_was_compared(paths: config.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(benchmark.Params, "benchmark.device=cuda", "variant=fused-fp16").benchmark
    with pytest.raises(
        RuntimeError, match=r"first python -m pipeline\.evaluate variant=fused-fp16 evaluate\.device=cuda"
    ):
        benchmark.run(paths, paths.reports / "benchmark", "fused-fp16", ALL, cfg)
    monkeypatch.setattr(evaluate, "gpu_name", lambda: "NVIDIA H200")
    scored(paths)
    with pytest.raises(RuntimeError, match=r"is of NVIDIA H200, and this is NVIDIA H100; first python -m"):
        benchmark.run(paths, paths.reports / "benchmark", "fused-fp16", ALL, cfg)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_replies_to_many_clients_must_be_those_to_one(paths: config.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of many come from another way through the model: a row of the KV cache each."""
    scored(paths)
    least = "benchmark.min_same_reply_fraction=0.5"
    cfg = load(benchmark.Params, "benchmark.device=cuda", "variant=fused-fp16", least).benchmark
    ask = benchmark.ask
    monkeypatch.setattr(benchmark, "ask", lambda *given: dataclasses.replace(ask(*given), text="!!!"))
    with pytest.raises(RuntimeError, match=r"fused-fp16 gives the reply of one client to 1 on 0\.0% of the calls"):
        benchmark.run(paths, paths.reports / "benchmark", "fused-fp16", ALL, cfg)
    assert not (paths.reports / "benchmark/cuda/fused-fp16.json").exists()


def test_export_for_cuda_needs_no_gpu(paths: config.Paths) -> None:
    torch.set_num_threads(1)  # on a busy machine several wait for each other, for minutes
    cfg = load(export.Params, "export.device=cuda").export
    report = paths.reports / "export/cuda.json"
    found = export.run(paths, report, cfg)
    assert {path.name for path in (paths.models / "cuda").iterdir()} == {"torch-fp16", "fused-fp16"}
    assert (paths.models / "cuda/fused-fp16/tools.json").read_bytes() == paths.tools.read_bytes()
    assert all(found[f"cuda/{name}"]["max_logit_difference"] < 0.01 for name in ("torch-fp16", "fused-fp16"))
    cfg.max_logit_difference_fp16 = 0
    with pytest.raises(RuntimeError, match=r"cuda/torch-fp16 differs .*export\.max_logit_difference_fp16 allows 0"):
        export.run(paths, report, cfg)


def test_quantize_for_cuda_needs_no_gpu(paths: config.Paths) -> None:
    cfg = load(quantize.Params, "quantize.device=cuda", "variant=int4").quantize
    found = quantize.run(paths, paths.reports / "quantize/cuda/int4.json", "int4", cfg)
    assert found["settings"] == dataclasses.asdict(cfg.cuda.int4)
    assert found["fp16_bytes"] > found["model_bytes"]
    assert files.read_json(paths.models / "cuda/int4/toolcaller.json")["runtime"] == "cuda"


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (quantize.Params, ["quantize.cuda.int8.dynamic=true"], "dynamic INT8 has no CUDA kernels"),
        (evaluate.Params, ["variant=onnx-fp32", "evaluate.device=cuda"], "variant must be one of .*fused-fp16"),
        (evaluate.Params, ["variant=fused-fp16"], "variant must be one of .*fused-fp32"),
        (benchmark.Params, ["variant=fused-fp32", "benchmark.device=cuda"], "variant must be one of .*fused-fp16"),
        (benchmark.Params, ["variant=torch-fp16", "benchmark.device=cpu"], "variant must be one of .*torch-fp32"),
    ],
)
def test_what_cuda_has_not_is_refused_before_any_work(schema: type, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(schema, *changes)


def test_cpu_path_needs_nothing_of_the_gpu(paths: config.Paths, tiny_fused: Path) -> None:
    """A benchmark of its own process, where NVML cannot be imported."""
    (paths.models / "fused").symlink_to(tiny_fused, target_is_directory=True)
    script = """
import runpy, sys
sys.modules["pynvml"] = None
runpy.run_module("pipeline.benchmark", run_name="__main__", alter_sys=True)
loaded = {"pipeline.bench.gpu", "pipeline.runtime.cuda", "pipeline.runtime.compiled"} & sys.modules.keys()
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    smoke = OmegaConf.load(ROOT / "tests/smoke.yaml").benchmark
    own = [f"benchmark.{key}={str(value).replace(' ', '')}" for key, value in smoke.items()]
    own += [
        "variant=fused-fp32",
        *(f"paths.{name}={getattr(paths, name)}" for name in ("prepared", "models", "reports")),
    ]
    command = [sys.executable, "-c", script, *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = files.read_json(paths.reports / "benchmark/fused-fp32.json")
    assert (found["device"], found["gpu_peak_bytes"], found["gpu_utilisation_fraction"]) == ("cpu", None, None)

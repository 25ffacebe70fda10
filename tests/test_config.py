"""Settings are refused before any work begins, by their full name."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import benchmark, config, cost, prepare, quantize, train
from pipeline.runtime.generation import ALL

ROOT = Path(__file__).parents[1]


def load(schema: type, *changes: str) -> object:
    raw = OmegaConf.load(ROOT / "params.yaml")
    return config.load(OmegaConf.merge(raw, OmegaConf.from_dotlist(list(changes))), schema)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "change", "message"),
    [
        (train.Params, "train.learning_rate=7", r"train.learning_rate must lie in \[1e-07, 1\], got 7"),
        (train.Params, "train.method=qlora", r"train.method must be one of \['full', 'lora'\], got 'qlora'"),
        (train.Params, "train.learningrate=1", "train.learningrate"),
        (train.Params, "train.epochs=many", "train.epochs"),
        (prepare.Params, "prepare.validation_fraction=1.5", "prepare.validation_fraction must lie in"),
        (
            prepare.Params,
            "prepare.none_fraction=0.9",
            r"foreign_fraction and later_fraction add up to 1.04",
        ),
        (benchmark.Params, "benchmark.concurrency=[]", "benchmark.concurrency must hold at least one value"),
        (quantize.Params, "quantize.int8.bits=5", r"bits must be one of \[4, 8\], got 5"),
        (quantize.Params, "variant=int3", r"variant must be one of \['int8', 'int4'\], got 'int3'"),
        (cost.Params, "cost.machine=nebius-h200", r"cost.machine must be one of \['aws-c7i.xlarge', 'fly-perf"),
        (cost.Params, "cost.gpu_machine=aws-c7i.xlarge", r"cost.gpu_machine must be one of \['aws-g6.xlarge', "),
        (cost.Params, "cost.machines.runpod-l40s.usd_per_hour=0", "cost.machines.runpod-l40s.usd_per_hour must lie in"),
        (benchmark.Params, "benchmark.device=tpu", "benchmark.device must be one of"),
        (benchmark.Params, "techniques.prefixes=-1", "techniques.prefixes must be 0 or more, got -1"),
        (
            benchmark.Params,
            "techniques.grammar=false",
            "techniques.forced, draft_tokens, guess_tokens and",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(schema: type, change: str, message: str) -> None:
    with pytest.raises((ValueError, OmegaConfBaseException), match=message):
        load(schema, change)


def test_techniques_of_params_are_those_of_the_python_api() -> None:
    assert config.load(OmegaConf.load(ROOT / "params.yaml"), benchmark.Params).techniques == ALL  # type: ignore[arg-type]


def test_an_absent_setting_is_named() -> None:
    raw = OmegaConf.load(ROOT / "params.yaml")
    del raw.train.seed
    with pytest.raises(OmegaConfBaseException, match="seed"):
        config.load(raw, train.Params)  # type: ignore[arg-type]


def test_a_stage_takes_overrides_and_refuses_unknown_ones_on_its_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.prepare", f"paths.prepared={tmp_path}/out", "prepare.request=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "request" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_says_what_a_stage_does_and_its_settings() -> None:
    """Hydra's own lists every folder as a group of settings: it took minutes, and told neither."""
    command = [sys.executable, "-m", "pipeline.score", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("Score the calls of any other model")
    assert "\nscore:\n  replies: null\n" in said
    assert "\ntrain:" not in said

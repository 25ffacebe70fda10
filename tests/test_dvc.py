"""Both dvc.yaml agree with the code: DVC cannot know what a stage imports or reads, a test can."""

import importlib
import re
import subprocess
from dataclasses import fields
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.bench import cuda

ROOT = Path(__file__).parents[1]


def stages(folder: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load((ROOT / folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {f"{folder}{name}": stage.get("do", stage) for name, stage in found.items()}


CUDA = "pipeline/cuda/"
STAGES = stages("") | stages(CUDA)


def script(stage: str) -> str:
    return str(STAGES[stage]["cmd"]).split()[2].removeprefix("pipeline.")


def project_imports(path: Path) -> set[str]:
    """Paths, from ROOT, of the non-empty project modules `path` imports, itself included."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(path))
    modules: dict[str, Any] = finder.modules  # typeshed: ModuleFinder.modules has no type for its values
    files = {Path(module.__file__) for module in modules.values() if module.__file__}
    return {str(file.relative_to(ROOT)) for file in files if file.stat().st_size}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_params_are_the_sections_it_reads(stage: str) -> None:
    params = importlib.import_module(f"pipeline.{script(stage)}").Params
    # deps and outs carry the paths, the command the variant
    sections = {field.name for field in fields(params)} - {"paths", "variant"}
    assert {key.partition(".")[0] for key in STAGES[stage]["params"]} == sections


@pytest.mark.parametrize("stage", STAGES)
def test_stage_deps_cover_every_project_module_it_imports(stage: str) -> None:
    """A module missing here is one whose change DVC would not notice."""
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert listed == project_imports(ROOT / "pipeline" / f"{script(stage)}.py")


def test_cuda_stages_are_on_the_gpu_and_the_others_are_not() -> None:
    for name, stage in STAGES.items():
        device = re.search(r" (\w+)\.device=(\w+)", stage["cmd"])
        if name.startswith(CUDA):
            assert stage["wdir"] == "../.."
            assert device is not None
            assert device.groups() == (name.removeprefix(CUDA), "cuda")
        else:
            assert device is None or device[2] == "cpu"


def test_cuda_stages_are_of_every_variant_and_leave_nothing_that_dvc_pull_would_miss() -> None:
    raw = yaml.safe_load((ROOT / CUDA / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in ("evaluate", "benchmark"):
        assert list(raw[stage]["foreach"]) == list(cuda.FOLDERS)
    models = {key: "${paths.models}/" + folder for key, folder in cuda.FOLDERS.items()}
    assert {key: found["model"] for key, found in raw["evaluate"]["foreach"].items()} == models
    assert {key: "${paths.models}/" + found for key, found in raw["benchmark"]["foreach"].items()} == models
    assert "${paths.reports}/evaluate/cuda/${key}.json" in raw["benchmark"]["do"]["deps"]  # the gate comes first
    outs = [out for name, stage in STAGES.items() if name.startswith(CUDA) for out in stage["outs"]]
    assert all(settings == {"cache": False} for out in outs for settings in out.values())


@pytest.mark.parametrize(("driver", "runs"), [("gpu", 3), ("cpu", 1)])
def test_make_run_goes_to_the_gpu_where_there_is_a_driver(driver: str, runs: int) -> None:
    command = ["make", "-n", "run", f"RUNTIME={driver}", "-o", "install"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("dvc repro") == runs
    assert done.stdout.count("dvc repro --keep-going pipeline/cuda/dvc.yaml") == runs // 2


def test_every_section_of_params_is_read_by_a_stage_or_a_program() -> None:
    params = set(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    read = {key.partition(".")[0] for stage in STAGES.values() for key in stage["params"]}
    assert (
        params
        - {"defaults", "hydra", "paths", "variant", "sweep", "release", "serve", "ray", "mcp", "load_test", "peers"}
        - {"growth", "learning_curve", "score"}
        == read
    )

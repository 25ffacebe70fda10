"""dvc.yaml agrees with the code: DVC cannot know what a stage imports or reads, a test can."""

import importlib
from dataclasses import fields
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def stages() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in found.items()}


STAGES = stages()


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


def test_every_section_of_params_is_read_by_a_stage_or_a_program() -> None:
    params = set(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    read = {key.partition(".")[0] for stage in STAGES.values() for key in stage["params"]}
    assert (
        params - {"defaults", "hydra", "paths", "variant", "sweep", "release", "serve", "mcp", "load_test", "peers"}
        == read
    )

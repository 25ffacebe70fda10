"""What README shows is what the committed reports say, and what README and docs have typed can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[1]


def test_result_table_is_the_reports() -> None:
    report = (ROOT / "reports/report.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = next(part for part in report.split("\n\n") if part.startswith("| variant"))
    assert table in readme


def test_every_make_target_and_stage_it_names_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z]+)", readme, re.MULTILINE)) <= targets
    for stage in re.findall(r"python -m pipeline\.([a-z_]+)", readme):
        assert (ROOT / "pipeline" / f"{stage}.py").exists()


def test_files_it_points_to_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def commands() -> list[str]:
    """What follows each `python -m` of README.md and docs, to the end of its code or line; `\\` joins lines."""
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]]
    return [
        found for text in texts for found in re.findall(r"python -m (pipeline\.[^`\n]*)", text.replace("\\\n", " "))
    ]


@pytest.mark.parametrize("command", commands())
def test_overrides_of_documented_commands_are_in_hydra_s_grammar(command: str) -> None:
    """README had `report.against=HEAD~1`, which Hydra refuses without quotes."""
    words = shlex.split(command, comments=True)[1:]
    OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])

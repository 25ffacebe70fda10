"""What README shows is what the committed reports say."""

import re
from pathlib import Path

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

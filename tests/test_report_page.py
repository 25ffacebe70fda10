"""The committed reports as a page: made quickly, small, and without faults in a browser."""

import html
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import config, cost, files
from pipeline.bench.tables import LADDER
from pipeline.report import ReportConfig, run

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The width that the page needs, and the width it has, as the page around it sees them.
FRAME = """<!doctype html><body><iframe src="report.html" width="{width}" height="800"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument
  page.querySelectorAll("details").forEach(part => part.open = true)
  const broken = [...page.images].filter(image => !image.naturalWidth).length
  document.body.dataset.found = `${{page.documentElement.scrollWidth}} ${{page.images.length}} ${{broken}}`
}}
</script></body>"""


def settings(**changed: float) -> ReportConfig:
    found = OmegaConf.load(ROOT / "params.yaml").report
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ReportConfig), found, changed))
    assert isinstance(cfg, ReportConfig)
    return cfg


def copy_reports(folder: Path) -> Path:
    """The committed ones, with prices as the code makes them now: those need no model."""
    reports = folder / "reports"
    shutil.copytree(ROOT / "reports", reports)
    raw: Any = OmegaConf.load(ROOT / "params.yaml")
    cost.run(reports, reports / "cost.json", config.load(raw, cost.Params).cost)
    return reports


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reports = copy_reports(tmp_path_factory.mktemp("project"))
    start = time.perf_counter()
    run(reports, settings())
    assert time.perf_counter() - start < 20
    return reports / "report.html"


def test_page_is_one_small_file_that_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 3e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_every_picture_of_the_folder_is_shown_once_with_its_title_and_figures_in_words(page: Path) -> None:
    pictures = re.findall(r"!\[([^\]]+)\]\(([a-z0-9/-]+)\.png\)", page.with_suffix(".md").read_text(encoding="utf-8"))
    words = [text for text, _ in pictures]
    plots = {name: text for text, name in pictures if name.startswith("plots/")}
    assert sorted(plots) == sorted(f"plots/{path.stem}" for path in (page.parent / "plots").iterdir())
    assert all(re.search(r"\d.*\. \S", text) for text in plots.values())
    assert len(set(words)) == len(words)
    shown = [html.unescape(text) for text in re.findall(r'<img [^>]*alt="([^"]+)"', page.read_text(encoding="utf-8"))]
    assert shown == words


def test_page_and_markdown_say_the_same_and_the_page_folds_the_replies_in(page: Path) -> None:
    source, text = (path.read_text(encoding="utf-8") for path in (page.with_suffix(".md"), page))
    headings = re.findall(r"^## (.+)$", source, re.MULTILINE)
    assert headings == re.findall(r"<h2 id=[^>]+>([^<]+)</h2>", text.partition('<details class="file">')[0])
    assert headings == re.findall(r'<a href="#[^"]+">([^<]+)</a>', text.partition("<nav>")[2].partition("</nav>")[0])
    assert len(re.findall(r"^\|:?-", source, re.MULTILINE)) == text.count("<table>")
    replies = page.with_name("examples.md").read_text(encoding="utf-8")
    assert text.partition('<details class="file">')[2].count("<h2") == replies.count("\n## ")


def test_report_is_made_where_nothing_passes_no_call_was_made_and_little_was_measured(tmp_path: Path) -> None:
    reports = copy_reports(tmp_path)
    (reports / "peers.json").unlink()
    nothing: dict[str, Any] = {"n": 0, "expected_calibration_error": None, "reliability": [], "risk_coverage": []}
    for name in LADDER:
        scored, bench = reports / f"evaluate/{name}.json", reports / f"benchmark/{name}.json"
        files.write_json(scored, files.read_json(scored) | {"calibration": nothing})
        files.write_json(bench, files.read_json(bench) | {"ablation": []})
    run(reports, settings(min_exact_fraction=1))
    text = (reports / "report.md").read_text(encoding="utf-8")
    assert "**None passes.**" in text
    assert "fused-fp32 makes too few calls to judge its confidence" in text
    assert "### Ablation of the techniques" not in text
    assert not {"peers.png", "techniques.png"} & {path.name for path in (reports / "plots").iterdir()}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_page_needs_no_horizontal_scrolling_and_reports_no_error(page: Path, width: int) -> None:
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        "--enable-logging=stderr", "--allow-file-access-from-files", f"--user-data-dir={page.parent / 'browser'}",
        "--virtual-time-budget=10000", "--window-size=1600,1000", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r'data-found="(\d+) (\d+) (\d+)"', html.unescape(done.stdout))
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    needed, pictures, broken = map(int, found.groups())
    assert needed <= width
    assert pictures > 5
    assert broken == 0
    assert "CONSOLE" not in done.stderr, done.stderr

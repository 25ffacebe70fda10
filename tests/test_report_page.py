"""The committed reports as a page: made quickly, small, and without faults in a browser."""

import html
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.report import ReportConfig, run

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The width that the page needs, and the width it has, as the page around it sees them.
FRAME = """<!doctype html><body><iframe src="report.html" width="{width}" height="800"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument
  const broken = [...page.images].filter(image => !image.naturalWidth).length
  document.body.dataset.found = `${{page.documentElement.scrollWidth}} ${{page.images.length}} ${{broken}}`
}}
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reports = tmp_path_factory.mktemp("project") / "reports"
    shutil.copytree(ROOT / "reports", reports)
    settings = OmegaConf.merge(OmegaConf.structured(ReportConfig), OmegaConf.load(ROOT / "params.yaml").report)
    cfg = OmegaConf.to_object(settings)
    assert isinstance(cfg, ReportConfig)
    start = time.perf_counter()
    run(reports, cfg)
    assert time.perf_counter() - start < 20
    return reports / "report.html"


def test_page_is_one_small_file_that_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 3e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


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

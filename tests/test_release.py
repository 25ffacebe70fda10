from pathlib import Path

import pytest

from pipeline import config, files
from pipeline.release import ReleaseConfig, run
from pipeline.runtime.caller import ToolCaller

TOOL = {"name": "Read", "description": "Read.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def paths(tmp_path: Path, tiny_fused: Path) -> config.Paths:
    models, reports = tmp_path / "models", tmp_path / "reports"
    models.mkdir()
    (models / "int8").symlink_to(tiny_fused, target_is_directory=True)
    files.write_json(models / "base/source.json", {"base": "path:x", "sha256": "0"})
    files.write_json(tmp_path / "tools.json", [TOOL])
    files.write_json(reports / "report.json", {"recommended": "int8"})
    files.write_json(reports / "train.json", {"train_requests": 7, "precision": "int8"})
    rates = dict.fromkeys(("exact_call_fraction", "right_tool_fraction", "must_call_fraction"), 0.5)
    scored = {**rates, "n": 4, "exact_call_ci95": [0.1, 0.9], "abstain_fraction": None}
    files.write_json(reports / "evaluate/int8.json", scored)
    machine = {"machine": {"cpu": "X", "cores": 2}}
    bench = {"call_s": {"p50": 0.1, "p95": 0.2}, "device": "cpu", "provenance": machine}
    files.write_json(reports / "benchmark/int8.json", bench)
    return config.Paths(tmp_path / "tools.json", tmp_path, tmp_path, tmp_path, models, reports)


def test_a_release_loads_with_its_own_tools_and_refuses_a_changed_byte(paths: config.Paths) -> None:
    folder = run(paths, "variant: int8\n", ReleaseConfig(None, None))
    assert "50.0% exact calls (95%: 10.0% to 90.0%)" in (folder / "README.md").read_text()
    caller = ToolCaller.load(folder, threads=1)
    assert [tool.name for tool in caller.tools] == ["Read"]
    weights = folder / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.onnx\.data: changed since its release"):
        ToolCaller.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.onnx\.data: missing"):
        ToolCaller.load(folder)


def test_a_release_of_another_form_of_the_prompt_is_refused(paths: config.Paths) -> None:
    folder = run(paths, "variant: int8\n", ReleaseConfig(None, None))
    manifest = files.read_json(folder / "manifest.json")
    for other in ({**manifest, "prompt": "0" * 64}, {"sha256": manifest["sha256"]}):
        files.write_json(folder / "manifest.json", other)
        with pytest.raises(ValueError, match=r"manifest\.json: .* prompts of another form .*: use the version"):
            ToolCaller.load(folder)


def test_nothing_recommended_asks_for_a_name(paths: config.Paths) -> None:
    files.write_json(paths.reports / "report.json", {"recommended": None})
    with pytest.raises(RuntimeError, match=r"recommends no variant: name one with release\.variant"):
        run(paths, "", ReleaseConfig(None, None))


def test_a_recommended_variant_that_is_not_served_asks_for_another(paths: config.Paths) -> None:
    files.write_json(paths.reports / "report.json", {"recommended": "torch-fp32"})
    with pytest.raises(RuntimeError, match=r"recommends torch-fp32, which is not served: name one"):
        run(paths, "", ReleaseConfig(None, None))

"""A folder to ship: one variant with its tokenizer, tools, settings, model card and hashes.

    python -m pipeline.release                  the variant that the report recommends
    python -m pipeline.release release.variant=int4
    python -m pipeline.release release.gguf=Q8_0    adds a GGUF file of the tuned model, for llama.cpp

Writes models/release. ToolCaller.load checks the hashes each time it opens such a folder.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline import config, files
from pipeline.model.gguf_export import QUANTIZATIONS, export_gguf
from pipeline.runtime.manifest import write_manifest

log = logging.getLogger(__name__)

LICENSE = Path(__file__).parents[1] / "LICENSE"  # Apache-2.0, like the default base model's
FOLDERS = {"fused-fp32": "fused", "int8": "int8", "int4": "int4"}


@dataclass
class ReleaseConfig:
    variant: str | None  # empty: the recommended one
    gguf: str | None  # weight type of a GGUF file to add; empty: none

    def __post_init__(self) -> None:
        config.require_one_of("release.gguf", self.gguf, [None, *QUANTIZATIONS])
        config.require_one_of("release.variant", self.variant, [None, *FOLDERS])


@dataclass
class Params:
    paths: config.Paths
    release: ReleaseConfig


def run(paths: config.Paths, settings: str, cfg: ReleaseConfig) -> Path:
    """Raises RuntimeError if no variant is named and the report recommends none, or one that is not served."""
    variant = cfg.variant or files.read_json(paths.reports / "report.json")["recommended"]
    if variant is None:
        raise RuntimeError("the report recommends no variant: name one with release.variant=int8")
    if variant not in FOLDERS:
        raise RuntimeError(f"the report recommends {variant}, which is not served: name one with release.variant=int8")
    out = paths.models / "release"
    with files.whole_folder(out) as folder:
        for path in sorted((paths.models / FOLDERS[variant]).iterdir()):
            shutil.copy(path, folder / path.name)
        if cfg.gguf:
            export_gguf(paths.models / "tuned", folder / f"model.{cfg.gguf}.gguf", cfg.gguf)
        shutil.copy(paths.tools, folder / "tools.json")
        shutil.copy(LICENSE, folder / "LICENSE")
        files.write_text(folder / "params.yaml", settings)
        files.write_text(folder / "README.md", card(variant, paths))
        write_manifest(folder)
    log.info("%s in %s, %.0f MB", variant, out, files.folder_bytes(out) / 1e6)
    return out


def card(variant: str, paths: config.Paths) -> str:
    scored = files.read_json(paths.reports / "evaluate" / f"{variant}.json")
    bench = files.read_json(paths.reports / "benchmark" / f"{variant}.json")
    train = files.read_json(paths.reports / "train.json")
    base = files.read_json(paths.models / "base" / "source.json")
    machine = bench["provenance"]["machine"]
    tools = [tool["name"] for tool in files.read_json(paths.tools)]
    low, high = scored["exact_call_ci95"]
    return f"""# Tool caller, {variant}

Makes the calls of {len(tools)} tools: {", ".join(tools)}.

- Base model: `{base["base"]}` (sha256 `{base["sha256"]}`), under its own licence; SmolLM2, the default, is Apache-2.0.
- Tuned on {train["train_requests"]} requests in English: phrasings written for the purpose, filled with file names,
  identifiers and lines of source code; no conversations of users. Products in {train["precision"]}.
- Scored on {scored["n"]} others: {scored["exact_call_fraction"]:.1%} exact calls (95%: {low:.1%} to {high:.1%}),
  right tool {scored["right_tool_fraction"]:.1%}, calls where it must {_percent(scored["must_call_fraction"])},
  abstains where it must {_percent(scored["abstain_fraction"])}.{_later(scored.get("later"))}
- p50 {1e3 * bench["call_s"]["p50"]:.0f} ms, p95 {1e3 * bench["call_s"]["p95"]:.0f} ms a call on {machine["cpu"]},
  {machine["cores"]} cores ({bench["device"]}).

It writes a call as `<tool_call>NAME`, then one line per argument, `name: value`, or `name = copy` of the request; texts
have no quotes or escapes (pipeline/toolcall/compact.py reads it). The prompt is ChatML; its system message lists the
tools (pipeline/toolcall/prompt.py).

Limits: one call a reply; English requests; other tools than these were a small part of its training.

    from pipeline.runtime.caller import ToolCaller
    ToolCaller.load("FOLDER").reply("Find TODO in src").call
"""


def _later(part: dict[str, Any] | None) -> str:
    if part is None:
        return ""
    return f"\n- Later in a conversation ({part['n']} requests): {part['exact_call_fraction']:.1%} exact calls."


def _percent(value: Any) -> str:
    return "not scored" if value is None else f"{value:.1%}"


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths, OmegaConf.to_yaml(raw), params.release)


if __name__ == "__main__":
    main()

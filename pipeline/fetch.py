"""Stage `fetch`: download the base model, or copy it from a folder.

Reads model.base; writes models/base: safetensors, tokenizer, source.json with the hash of the source file.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.model import base

log = logging.getLogger(__name__)


@dataclass
class Params:
    paths: config.Paths
    model: config.ModelConfig


def run(out: Path, cfg: config.ModelConfig) -> None:
    base.check_source(cfg.base)
    log.info("fetching %s", cfg.base)
    model, tokenizer, digest = base.fetch_base(cfg.base, cfg.sha256)
    with files.whole_folder(out) as folder:
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=files.ONE_FILE)
        tokenizer.save_pretrained(folder)
        files.write_json(folder / "source.json", {"base": cfg.base, "sha256": digest})
    log.info("%.1f million parameters in %s", model.num_parameters() / 1e6, out)


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.models / "base", params.model)


if __name__ == "__main__":
    main()

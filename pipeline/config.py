"""Settings: sections of params.yaml as checked dataclasses."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

T = TypeVar("T")


@dataclass
class Paths:
    tools: Path
    keywords: Path
    requests: Path
    prepared: Path
    models: Path
    reports: Path


@dataclass
class ModelConfig:
    base: str
    sha256: str | None


def load(raw: DictConfig, schema: type[T]) -> T:
    """The sections of params.yaml named by the fields of `schema`, as an instance of it.

    Raises omegaconf's ValidationError, ConfigKeyError or MissingMandatoryValue, naming the full
    key, for a wrong type, an unknown key or a missing one; ValueError from a section's own check.
    """
    wanted = OmegaConf.structured(schema)
    checked = OmegaConf.merge(wanted, OmegaConf.masked_copy(raw, list(wanted)))
    return cast(T, OmegaConf.to_object(checked))


def main(run: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Make Hydra call `run` with the settings of params.yaml and the command line's overrides.

    `--help` shows the docstring of its module and the settings in its Params. Hydra's own help searches all folders
    beside params.yaml for config groups, .venv included, which takes minutes.
    """
    import hydra  # not at the top: imports there add to the measured memory of the models

    started = hydra.main(version_base="1.3", config_path="..", config_name="params")(run)

    @wraps(run)
    def with_help() -> Any:
        if {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            return started()
        module = sys.modules[run.__module__]
        settings = OmegaConf.load(Path(__file__).parents[1] / "params.yaml")
        mine = OmegaConf.masked_copy(cast(DictConfig, settings), [found.name for found in fields(module.Params)])
        print(f"{module.__doc__}\nSettings, each to be overridden as section.name=value:\n\n{OmegaConf.to_yaml(mine)}")  # noqa: T201
        return None

    return with_help


def require_range(key: str, value: float, least: float, most: float) -> None:
    """Raises ValueError naming `key` and the range if `value` lies outside it."""
    if not least <= value <= most:
        raise ValueError(f"{key} must lie in [{least:g}, {most:g}], got {value:g}")


def require_ranges(key: str, values: Sequence[float], least: float, most: float) -> None:
    """Raises ValueError if there is no value, or one outside the range."""
    if not values:
        raise ValueError(f"{key} must hold at least one value")
    for value in values:
        require_range(key, value, least, most)


def require_one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {list(allowed)}, got {value!r}")

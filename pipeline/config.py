"""Settings: sections of params.yaml as checked dataclasses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

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
    """The sections of params.yaml that `schema` has as fields, as an instance of `schema`.

    Raises omegaconf's ValidationError, ConfigKeyError or MissingMandatoryValue, naming the full
    key, for a wrong type, an unknown key or an absent one; ValueError from a section's own check.
    """
    wanted = OmegaConf.structured(schema)
    checked = OmegaConf.merge(wanted, OmegaConf.masked_copy(raw, list(wanted)))
    return cast(T, OmegaConf.to_object(checked))


def require_range(key: str, value: float, least: float, most: float) -> None:
    """Raises ValueError naming `key` and the range where `value` lies outside it."""
    if not least <= value <= most:
        raise ValueError(f"{key} must lie in [{least:g}, {most:g}], got {value:g}")


def require_one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {list(allowed)}, got {value!r}")

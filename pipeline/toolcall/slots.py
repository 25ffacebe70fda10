"""Phrasings with `{{slots}}` filled from lists: data/requests/README.md has the rules."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAME = re.compile("[a-z_]+")
SLOT = re.compile(rf"\{{\{{({NAME.pattern}(?:#\d+)?)(?:\.(\w+))?\}}\}}")

_MEANT = re.compile(r'\{\{\w[^\s{}"]*\}\}')  # `{{ url }}` and `{{.Names}}` are text

Record = str | dict[str, Any]


def check_slots(value: Any, where: str) -> None:
    """Raises ValueError naming what looks like a slot in a string of `value`, but would stay there as text."""
    for found in _MEANT.findall(json.dumps(value, ensure_ascii=False)):
        if not SLOT.fullmatch(found):
            raise ValueError(
                f"{where}: {found} is no slot: expected {{{{name}}}}, {{{{name#2}}}} or {{{{name.field}}}}, "
                "where name is of a-z and _"
            )


class Draw:
    """One set of draws: in it a slot has the same value wherever it occurs, also inside other slots."""

    def __init__(self, slots: Mapping[str, Sequence[Record]], rng: random.Random, where: str) -> None:
        self._slots, self._rng, self._where = slots, rng, where
        self._drawn: dict[str, Record] = {}

    def fill(self, value: Any, within: str = "") -> Any:
        """`value` with the slots in its strings filled; a string that is just one slot takes the type of its value."""
        if isinstance(value, dict):
            return {key: self.fill(inner, within) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, within) for inner in value]
        if not isinstance(value, str):
            return value
        if whole := SLOT.fullmatch(value):
            return self._value(whole, within)
        return SLOT.sub(lambda found: str(self._value(found, within)), value)

    def _value(self, found: re.Match[str], within: str) -> Any:
        key, field = found.group(1), found.group(2)
        name, _, number = key.partition("#")
        if name not in self._slots:
            raise ValueError(f"{self._where}: no slot {name!r}; a file slots/{name}.txt or .jsonl makes one")
        # Slots inside the second draw of a slot are second draws too: path#2 has a folder of its own.
        within = f"{within}#{number}" if number else within
        drawn_as = f"{name}{within}"
        if drawn_as not in self._drawn:
            self._drawn[drawn_as] = self._draw(name)
        record = self._drawn[drawn_as]
        if field is None and isinstance(record, str):
            return self.fill(record, within)
        if field is None or isinstance(record, str) or field not in record:
            raise ValueError(f"{self._where}: slot {found.group()} names no field of {str(record)[:80]!r}")
        return self.fill(record[field], within)

    def _draw(self, name: str) -> Record:
        """A record not drawn before, while any is left: two equal ones in a request could not be told apart.

        A record with slots may be drawn again, because its own draws differ. A repeated record weighs more.
        """
        taken = [record for drawn_as, record in self._drawn.items() if drawn_as.partition("#")[0] == name]
        used = [record for record in taken if not SLOT.search(json.dumps(record))]
        records = self._slots[name]
        left = [record for record in records if record not in used] if used else records
        return self._rng.choice(left or records)

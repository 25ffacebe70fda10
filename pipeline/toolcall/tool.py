"""Tools on offer, as data: a name, a description of one line, and a JSON schema of the arguments."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jsonschema
import referencing
from jsonschema.validators import extend

from pipeline.toolcall import copies


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, Any]  # a JSON schema of type object

    def fault(self, arguments: dict[str, Any]) -> str | None:
        """Why `arguments` do not fit the schema, or None if they do.

        Raises ValueError if the schema refers to something that is not in it, or to itself without end.
        """
        try:
            error = next(iter(_validator(json.dumps(self.parameters)).iter_errors(arguments)), None)
        except (referencing.exceptions.Unresolvable, RecursionError) as fault:
            raise ValueError(f"tool {self.name}: its parameters refer to nothing, or to themselves: {fault}") from fault
        return None if error is None else f"{error.json_path}: {error.message}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }


def parse_tools(value: Any, where: str) -> tuple[Tool, ...]:
    """Raises ValueError naming `where` and the tool without a name or a valid JSON schema, or with another's name."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of at least one tool, got {str(value)[:80]!r}")
    tools = tuple(_parse_tool(tool, f"{where}: tool {at}") for at, tool in enumerate(value, 1))
    names = Counter(tool.name for tool in tools)
    if len(names) < len(tools):
        raise ValueError(f"{where}: tools named twice: {sorted(name for name, n in names.items() if n > 1)}")
    return tools


def _parse_tool(value: Any, where: str) -> Tool:
    match value:
        case {"name": str(name), "parameters": dict(parameters)} if name:
            description = value.get("description", "")
        case _:
            raise ValueError(f"{where}: needs a name and parameters, got {str(value)[:120]!r}")
    if not isinstance(description, str):
        raise ValueError(f"{where} ({name}): description: expected a text, got {str(description)[:80]!r}")
    try:
        _validator(json.dumps(parameters))
    except jsonschema.SchemaError as error:
        raise ValueError(f"{where} ({name}): parameters are no JSON schema: {error.message}") from error
    if parameters.get("type") != "object":
        raise ValueError(f"{where} ({name}): parameters must be of type object")
    properties = parameters.get("properties", {})
    for at, (argument, schema) in enumerate(properties.items()):
        if isinstance(schema, dict) and "x-copy" in schema and (wrong := copies.fault(schema, list(properties)[:at])):
            raise ValueError(f"{where} ({name}): {argument}: {wrong}")
    return Tool(name, description, parameters)


def _unchecked(*_: Any) -> tuple[()]:
    return ()


def _other_properties(validator: Any, wanted: Any, arguments: Any, schema: dict[str, Any]) -> Iterator[Any]:
    if "patternProperties" not in schema:
        yield from jsonschema.Draft202012Validator.VALIDATORS["additionalProperties"](
            validator, wanted, arguments, schema
        )


# A client's schema must not hold up the server: Python's regular expressions can take hours for one line. The grammar
# enforces `pattern` in replies, in linear time.
_Validator = extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {
        **dict.fromkeys(("pattern", "patternProperties", "unevaluatedProperties"), _unchecked),
        "additionalProperties": _other_properties,
    },
)
_SHORT = 20_000  # characters of a schema whose validator is cached


def _validator(schema: str) -> Any:
    """Cached, because a check takes milliseconds and thousands of requests bring the same tools; not for long schemas,
    which would fill the memory. Raises jsonschema's SchemaError if `schema` is invalid.
    """
    return _kept_validator(schema) if len(schema) <= _SHORT else _new_validator(schema)


def _new_validator(schema: str) -> Any:
    found = json.loads(schema)
    jsonschema.Draft202012Validator.check_schema(found)
    return _Validator(found, registry=referencing.Registry())  # fetches no URL that a schema refers to


_kept_validator = lru_cache(512)(_new_validator)


def find_tool(tools: Sequence[Tool], name: str) -> Tool | None:
    return next((tool for tool in tools if tool.name == name), None)

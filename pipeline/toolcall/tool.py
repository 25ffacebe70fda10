"""Tools on offer, as data: a name, one line, and a JSON schema of the arguments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jsonschema

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
        """What keeps `arguments` from fitting the schema, or None where they fit."""
        error = next(iter(_validator(json.dumps(self.parameters)).iter_errors(arguments)), None)
        return None if error is None else f"{error.json_path}: {error.message}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }


def parse_tools(value: Any, where: str) -> tuple[Tool, ...]:
    """Raises ValueError naming `where` and the tool that has no name, or no JSON schema, or a twin."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of at least one tool, got {str(value)[:80]!r}")
    tools = tuple(_parse_tool(tool, f"{where}: tool {at}") for at, tool in enumerate(value, 1))
    names = [tool.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{where}: tools named twice: {sorted(twice)}")
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


# Thousands of requests bring the same tools with them, and to check a schema takes milliseconds; clients bring others.
@lru_cache(1024)
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    """Raises jsonschema's SchemaError where `schema` is none."""
    found = json.loads(schema)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def find_tool(tools: Sequence[Tool], name: str) -> Tool | None:
    return next((tool for tool in tools if tool.name == name), None)

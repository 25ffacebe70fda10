"""Puts a client's tools and texts into the form that the model knows, in training as on the server."""

import re
from collections.abc import Sequence

from pipeline.toolcall.tool import Tool, find_tool, parse_tools

_LINE_NUMBER = re.compile(r"^ *(\d+)[\t→]", re.MULTILINE)
REMINDER, ITS_END = "<system-reminder>", "</system-reminder>"


def offered(tools: Sequence[Tool], own: tuple[Tool, ...], wanted: str | None) -> tuple[Tool, ...]:
    """`tools` in the form that the model was trained with, the known ones first and in the order of `own`.

    A tool with the name of one in `own` is replaced by that one if it accepts all its calls: agents describe a tool in
    pages, the model learnt a line. Other tools keep the first line of their description. `wanted`: the only tool to
    keep. Raises ValueError if it is not among `tools`, or if a schema is invalid.
    """
    if not tools:
        return ()
    parse_tools([tool.to_json() for tool in tools], "tools")
    if wanted is not None and find_tool(tools, wanted) is None:
        raise ValueError(f"tool_choice: no tool {wanted!r} among {[tool.name for tool in tools]}")
    theirs = {tool.name: tool for tool in tools if wanted in (None, tool.name)}
    known = [mine for mine in own if mine.name in theirs and _takes(theirs[mine.name], mine)]
    names = {tool.name for tool in known}
    return (*known, *(_short(tool) for tool in theirs.values() if tool.name not in names))


def _takes(theirs: Tool, mine: Tool) -> bool:
    """Whether every call that fits `mine` fits `theirs`, judged by the names of the arguments."""
    required = set(theirs.parameters.get("required", []))
    names = set(theirs.parameters.get("properties", {}))
    return required <= set(mine.parameters.get("required", [])) and set(mine.parameters.get("properties", {})) <= names


def _short(tool: Tool) -> Tool:
    first = tool.description.strip().partition("\n")[0]
    return Tool(tool.name, first, tool.parameters)


def visible(text: str, role: str = "user") -> str:
    """`text` without what an agent adds to its user's words. In a tool's result, numbered lines become
    `12<tab>text`: some agents write `   12→text`.
    """
    if role == "tool":
        text = _LINE_NUMBER.sub("\\1\t", text)
    kept, at = [], 0
    while (start := text.find(REMINDER, at)) >= 0 and (end := text.find(ITS_END, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(ITS_END)
        while text[at : at + 1].isspace():
            at += 1
    return "".join([*kept, text[at:]]).strip("\n")

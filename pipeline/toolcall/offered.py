"""What a client sends - tools, texts - as the model knows it: in training as on the server."""

import re
from collections.abc import Sequence

from pipeline.toolcall.tool import Tool, find_tool, parse_tools

_LINE_NUMBER = re.compile(r"^ *(\d+)[\t→]", re.MULTILINE)
REMINDER, ITS_END = "<system-reminder>", "</system-reminder>"


def offered(tools: Sequence[Tool], own: tuple[Tool, ...], wanted: str | None) -> tuple[Tool, ...]:
    """`tools` in the form that the model was trained with, the known ones first and in its order.

    A tool that bears the name of one of `own`, and takes every call that fits it, is replaced by it: agents describe
    their tools on pages, the model learnt a line of each. Of others the first line of the description is kept.
    `wanted`: the only one to keep. Raises ValueError where it is not among them, or a schema is none.
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
    """Does every call that fits `mine` fit `theirs`, as far as names of arguments tell?"""
    required = set(theirs.parameters.get("required", []))
    names = set(theirs.parameters.get("properties", {}))
    return required <= set(mine.parameters.get("required", [])) and set(mine.parameters.get("properties", {})) <= names


def _short(tool: Tool) -> Tool:
    first = tool.description.strip().partition("\n")[0]
    return Tool(tool.name, first, tool.parameters)


def visible(text: str, role: str = "user") -> str:
    """Without what an agent adds to its user's words. In a tool's result the lines of a file as `12<tab>text`: agents
    number them as `   12→text`, too.
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

"""Drafts of how a call goes on, for the model to check in one step.

Paths can be recognized, and text to copy is often quoted. At the start of an argument the guess is such a piece of the
request; after it, the next required argument or the end of the call. A wrong guess costs time, but changes no reply.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pipeline.toolcall import copies
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool, find_tool

_QUOTES = (
    r"```[^\n]*\n(.*?)\n?```",
    r"`([^`\n]+)`",
    r'"([^"\n]+)"',
    r"(?<!\w)'([^'\n]+)'(?!\w)",
    r"“([^”\n]+)”",
)
_QUOTED = re.compile("|".join(_QUOTES), re.DOTALL)
_PATH = re.compile(
    r"(?<![\w/.~\\=@+-])(?:~?\.{0,2}/)?[\w.@+\\/-]*[/.\\][\w@+-][\w.@+\\/-]*(?<![.])"  # src/app.py, README.md, ~/.ssh
    r"|(?<![\w/.@+-])[\w.@+-]+/(?!\w)"  # lib/
)
# Not a plain word: 1.4.9, tmpBuf, TODO
_CODE = re.compile(r"(?<!\S)(?=\S*(?:[\d_=(){}\[\]<>$:*\\]|[a-z][A-Z]|[A-Z]{2}))\S+")


class Drafter:
    """For one request, whose text is `text`. `tokenizer`: as in prompt.py; `end`: the token that ends a reply."""

    def __init__(self, tokenizer: Any, tools: Sequence[Tool], text: str, end: int) -> None:
        self._tokenizer, self._tools, self._text, self._end = tokenizer, tools, text, end

    def after(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow the reply's `tokens`; none unless they end at an argument to copy."""
        written = str(self._tokenizer.decode(tokens))
        guessed, ends = written, False
        while len(guessed) < len(written) + 8 * limit and (more := self._next(guessed)) is not None:
            guessed += more
            if ends := not more:
                break
        if guessed == written and not ends:
            return []
        found = self._tokenizer.encode(guessed, split_special_tokens=True)
        if found[: len(tokens)] != list(tokens):
            return []
        return [*found[len(tokens) :], *([self._end] if ends else [])][:limit]

    def _next(self, written: str) -> str | None:
        """The next piece of the call, an empty text for its end, None if there is no guess."""
        name, line, _ = written.removeprefix(OPENING).partition("\n")
        tool = find_tool(self._tools, name)
        if tool is None or not line:
            return None
        properties: dict[str, Any] = tool.parameters.get("properties", {})
        at, key = max((written.rfind(f"\n{key}"), key) for key in properties)
        rest, before = written[at + 1 + len(key) :], written[:at]
        if not rest:
            return copies.COPY.rstrip() if self._candidate(properties[key], "", before) is not None else None
        if not rest.startswith(copies.COPY.rstrip()):
            return None
        value = rest[len(copies.COPY.rstrip()) :]
        copy = self._candidate(properties[key], value[1:], before)
        if copy is None:
            return None
        return f" {copy}"[len(value) :] or self._following(tool, key, written)

    def _candidate(self, schema: Any, begun: str, before: str) -> str | None:
        """What to copy for an argument that starts with `begun`, or None; nothing already copied in `before`."""
        kind = copies.copy_of(schema)
        candidates = self._paths if kind == "path" else self._texts if kind in copies.SEPARATORS else []
        return next((one for one in candidates if one.startswith(begun) and f"= {one}" not in before), None)

    def _following(self, tool: Tool, key: str, written: str) -> str:
        properties, required = tool.parameters["properties"], tool.parameters.get("required", [])
        for later in list(properties)[list(properties).index(key) + 1 :]:
            if later in required or (
                copies.copy_of(properties[later]) == "path" and self._candidate(properties[later], "", written)
            ):
                return f"\n{later}"
        return ""

    @cached_property
    def _texts(self) -> list[str]:
        """Quoted texts; if there are none, words that look like code."""
        quoted = [next(filter(None, found.groups()), "") for found in _QUOTED.finditer(self._text)]
        code = [found[0].strip(",.:;?!") for found in _CODE.finditer(self._text)]
        return quoted or [text for text in code if text not in self._paths]

    @cached_property
    def _paths(self) -> list[str]:
        found = [path[0] for path in _PATH.finditer(self._text)]
        return [path for path in found if not path.replace(".", "").isdigit()]  # not 1.4.9

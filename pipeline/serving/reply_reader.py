"""From a growing reply to what a stream says next: text, a call's name, more of its arguments."""

import json
from dataclasses import dataclass

from pipeline.toolcall.reply import OPENING, parse_call


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class CallBegun:
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    text: str


Event = TextDelta | CallBegun | ArgumentsDelta


class ReplyReader:
    """Says everything once, and nothing before it is certain. A call's arguments come when it is whole."""

    def __init__(self) -> None:
        self._named = False
        self._said = 0  # characters of the text

    def read(self, text: str, last: bool, finished: bool = True) -> list[Event]:
        """`text`: all of the reply so far, a whole call as JSON; `finished`: the last came to its own end."""
        if text.startswith(OPENING):
            return self._call(text, last, finished)
        if not last and OPENING.startswith(text):
            return []  # it may still become a call
        new = (text if last else text.removesuffix("\ufffd"))[self._said :]
        self._said += len(new)
        return [TextDelta(new)] if new else []

    def _call(self, text: str, last: bool, finished: bool) -> list[Event]:
        call = parse_call(text) if last and finished else None
        name, line, _ = text.removeprefix(OPENING).partition("\n")
        events: list[Event] = []
        if not self._named and (call or (line and not last)):
            self._named = True
            events.append(CallBegun(call.name if call else name))
        if call:
            events.append(ArgumentsDelta(json.dumps(call.arguments, ensure_ascii=False)))
        return events

"""From a growing reply to what a stream says next: text, a call's name, more of its arguments."""

from dataclasses import dataclass

from pipeline.toolcall.reply import CLOSING, OPENING

NAME, ARGUMENTS = '{"name": "', '", "arguments": '
END = "}" + CLOSING


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
    """Says everything once, and nothing before it is certain."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._said = 0  # characters of the text, or of the arguments

    def read(self, text: str, last: bool, finished: bool = True) -> list[Event]:
        """`text`: all of the reply so far; `last`: there is no more; `finished`: it came to its own end."""
        if OPENING.startswith(text[: len(OPENING)]) and text:
            if text.startswith(OPENING):
                return self._call(text[len(OPENING) :], last and finished)
            if not last:
                return []  # it may still become a call
        return self._more(TextDelta, text if last else text.removesuffix("\ufffd"))

    def _call(self, body: str, whole: bool) -> list[Event]:
        events: list[Event] = []
        name, found, arguments = body.removeprefix(NAME).partition(ARGUMENTS)
        if not found:
            return []
        if self._name is None:
            self._name = name
            events.append(CallBegun(name))
        # Until the end is certain, the last characters may be the marker's and not the arguments'.
        said = arguments.removesuffix(END) if whole else arguments[: -len(END)].removesuffix("\ufffd")
        return events + self._more(ArgumentsDelta, said)

    def _more(self, kind: type[TextDelta] | type[ArgumentsDelta], text: str) -> list[Event]:
        new = text[self._said :]
        self._said = max(self._said, len(text))
        return [kind(new)] if new else []

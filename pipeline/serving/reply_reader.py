"""From a growing reply to what a stream says next: text, a call's name, more of its arguments."""

import json
from dataclasses import dataclass

from pipeline.serving.engine import Piece
from pipeline.toolcall.reply import OPENING


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

    def read(self, piece: Piece) -> list[Event]:
        """What is new in `piece`, which has all of the reply so far."""
        if piece.tool and not self._named:
            self._named = True
            return [CallBegun(piece.tool), *self.read(piece)]
        if piece.call:
            return [ArgumentsDelta(json.dumps(piece.call.arguments, ensure_ascii=False))]
        begun = piece.text.startswith(OPENING) or OPENING.startswith(piece.text)
        if piece.is_cut_call or (begun and not piece.last):
            return []  # it may still become a call
        new = (piece.text if piece.last else piece.text.removesuffix("\ufffd"))[self._said :]
        self._said += len(new)
        return [TextDelta(new)] if new else []

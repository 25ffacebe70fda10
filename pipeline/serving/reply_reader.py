"""From a growing reply to what a stream says next of its text."""

from pipeline.serving.engine import Piece


class ReplyReader:
    """Says everything once, and nothing before it is certain. A call, until it is whole, is nothing."""

    def __init__(self) -> None:
        self._said = 0  # characters of the text

    def read(self, piece: Piece) -> str:
        """The text that is new in `piece`, which has all of the reply so far."""
        if piece.call or (piece.may_be_call and not piece.finished):
            return ""
        new = (piece.text if piece.last else piece.text.removesuffix("\ufffd"))[self._said :]
        self._said += len(new)
        return new

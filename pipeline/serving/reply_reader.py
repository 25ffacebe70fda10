"""The text to stream next, from a reply that grows."""

from pipeline.serving.engine import Piece


class ReplyReader:
    """Gives each text once, as soon as it is certain not to change. Nothing of a call is given as text."""

    def __init__(self) -> None:
        self._said = 0  # characters given so far

    def read(self, piece: Piece) -> str:
        """The new text in `piece`, which holds the whole reply so far."""
        if piece.call or (piece.may_be_call and not piece.finished):
            return ""
        new = (piece.text if piece.last else piece.text.removesuffix("\ufffd"))[self._said :]
        self._said += len(new)
        return new

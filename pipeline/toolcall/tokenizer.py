"""A model folder's tokenizer, without transformers: its import takes seconds and hundreds of megabytes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from llguidance import LLTokenizer

from pipeline import files


class Tokenizer:
    """What of transformers' fast tokenizers is used here, with the same results."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where `folder` has no tokenizer.json."""
        self._file = str(folder / "tokenizer.json")
        if not Path(self._file).exists():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json: only fast tokenizers can be used")
        self._markup = tokenizers.Tokenizer.from_file(self._file)
        self._text = tokenizers.Tokenizer.from_file(self._file)
        self._text.encode_special_tokens = True
        for found in (self._markup, self._text):
            found.no_padding()
            found.no_truncation()
        eos = files.read_json(folder / "tokenizer_config.json")["eos_token"]
        self.eos_token_id: int = self._markup.token_to_id(eos["content"] if isinstance(eos, dict) else eos)

    def __len__(self) -> int:
        return int(self._markup.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        """`split_special_tokens`: text that looks like a special token is text."""
        found = self._text if split_special_tokens else self._markup
        return list(found.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._markup.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """For grammars. Making it takes a moment."""
        return LLTokenizer(self._markup.to_str(), n_vocab=len(self), eos_token=self.eos_token_id)

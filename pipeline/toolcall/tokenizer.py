"""A model folder's tokenizer, without transformers, whose import takes seconds and hundreds of megabytes."""

import threading
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

import tokenizers
from llguidance import LLTokenizer, TokenizerWrapper

from pipeline import files


class Tokenizer:
    """The part of transformers' fast tokenizers that is used here, with the same results."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if `folder` has no tokenizer.json."""
        self._file = str(folder / "tokenizer.json")
        if not Path(self._file).exists():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json: only fast tokenizers can be used")
        self._tokenizer = tokenizers.Tokenizer.from_file(self._file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lock = threading.Lock()  # `encode` sets an option, and the server encodes on several threads
        eos = files.read_json(folder / "tokenizer_config.json")["eos_token"]
        self.eos_token_id: int = self._tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        """`split_special_tokens`: encode what looks like a special token as text."""
        with self._lock:
            self._tokenizer.encode_special_tokens = split_special_tokens
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """For grammars; takes a moment to make."""
        # Slices would speed up masks that allow any text, but few are made here, and slices take 16 MB.
        options = {"n_vocab": len(self), "eos_token": self.eos_token_id, "slices": []}
        own = LLTokenizer(self._tokenizer.to_str(), **options)
        # `own` holds a second tokenizer, of 10 MB. It is needed only for the bytes of each token, then freed.
        # The wrapper gets a copy of `self`, which has no vocabulary: a cycle through Rust would never be freed.
        return LLTokenizer(TokenizerWrapper(_Encoder(copy(self), own)), **options)


class _Encoder:
    """The interface that TokenizerWrapper needs."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, None
        self.tokens = [vocabulary.decode_bytes([token]) for token in range(len(tokenizer))]
        self.special_token_ids = [token for token in range(len(tokenizer)) if vocabulary.is_special_token(token)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, split_special_tokens=True)

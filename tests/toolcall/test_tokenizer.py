import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.toolcall.prompt import END, START
from pipeline.toolcall.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def theirs(tiny_base: Path) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_base)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.text() | st.sampled_from([START, END, " ,", "\n"])).map("".join), split=st.booleans())
def test_tokens_and_texts_are_those_of_transformers(
    tiny_base: Path, theirs: PreTrainedTokenizerFast, text: str, split: bool
) -> None:
    own = Tokenizer(tiny_base)
    ids = own.encode(text, split_special_tokens=split)
    assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=split)
    assert own.decode(ids) == theirs.decode(ids) == text
    assert (own.eos_token_id, len(own)) == (theirs.eos_token_id, len(theirs))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.text() | st.sampled_from([START, END, " ,", "\n"])).map("".join))
def test_a_grammar_reads_a_text_as_a_request_does(tiny_base: Path, text: str) -> None:
    """Special tokens written in it are text."""
    tokenizer = Tokenizer(tiny_base)
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert vocabulary.tokenize_str(text) == ids
    assert vocabulary.decode_bytes(ids) == text.encode()
    assert vocabulary.is_special_token(tokenizer.eos_token_id)


def test_a_tokenizer_that_nobody_needs_is_freed(tiny_base: Path) -> None:
    tokenizer = Tokenizer(tiny_base)
    assert tokenizer.vocabulary.vocab_size == len(tokenizer)
    left = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert left() is None


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="only fast tokenizers can be used"):
        Tokenizer(tmp_path)


def test_server_needs_neither_torch_nor_transformers() -> None:
    """They take seconds to import, and hundreds of megabytes."""
    code = "import sys, pipeline.serve, pipeline.runtime.ort; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

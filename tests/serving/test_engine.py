"""The engine's thread, and what of a conversation it reads."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.caller import ToolCaller, TooLongError
from pipeline.runtime.generation import Choice
from pipeline.serving import anthropic_wire, openai_wire
from pipeline.serving.engine import NICE, Asked, Engine, Piece, Said, fit, in_turn
from pipeline.toolcall.conversation import Message
from pipeline.toolcall.reply import parse_call, write_call
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, ToolCall
from tests.serving.conftest import TOOLS, ScriptedRuntime


def no_model() -> ToolCaller:
    raise FileNotFoundError("no model here")


def test_failure_before_the_model_is_loaded_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the priority could not be set, the thread died and who waited for the model waited forever."""

    def refuse(*_: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse)
    engine = Engine(no_model, 1, 1)
    engine.join(5)
    assert engine._loaded.is_set()
    with pytest.raises(PermissionError, match="Permission denied"):
        engine.wait_until_loaded()


@pytest.mark.parametrize(("own", "expected"), [(0, NICE), (NICE, NICE), (10, 10)])
def test_priority_that_was_lowered_stays(monkeypatch: pytest.MonkeyPatch, own: int, expected: int) -> None:
    """Started at nice 10, it asked for 5, which only root may."""
    asked: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda *_: own)
    monkeypatch.setattr(os, "setpriority", lambda *given: asked.append(given[2]))
    with pytest.raises(FileNotFoundError, match="no model here"):
        Engine(no_model, 1, 1).wait_until_loaded()
    assert asked == [expected]


def read(path: str) -> ToolCall:
    return ToolCall("Read", {"file_path": path})


def test_results_stand_behind_their_calls() -> None:
    said = [
        Said("user", "read three"),
        Said("assistant", "Yes.", (("a", read("a")), ("b", read("b")), ("c", read("c")))),
        Said("tool", "of c", answers="c"),
        Said("tool", "of nothing", answers="x"),
        Said("tool", "of a", answers="a"),
        Said("tool", "of a once more", answers="a"),
        Said("tool", "of nothing either"),
        Said("tool", "of b", answers="b"),
    ]
    assert [message["content"] for message in in_turn(said)] == [
        "read three",
        "Yes.\n" + write_call(read("a")),
        "of a",
        write_call(read("b")),
        "of b",
        write_call(read("c")),
        "of c",
        "of nothing",
        "of a once more",
        "of nothing either",
    ]


def test_result_is_of_the_last_call_with_its_id() -> None:
    """Some clients number the calls of each turn from 1."""
    said = [Said("user", "go")]
    for path in "ab":
        said += [Said("assistant", "", (("1", read(path)),)), Said("tool", f"of {path}", answers="1")]
    assert [message["content"] for message in in_turn(said)][2::2] == ["of a", "of b"]


def test_last_call_needs_its_result() -> None:
    said = [Said("user", "go"), Said("assistant", "", (("a", read("a")), ("b", read("b"))))]
    with pytest.raises(ValueError, match="the results of all calls"):
        in_turn([*said, Said("tool", "of a", answers="a")])


class CountingTokenizer(Tokenizer):
    characters = 0

    def encode(self, text: str, *options: Any, **more: Any) -> list[int]:
        self.characters += len(text)
        return super().encode(text, *options, **more)


@pytest.fixture
def counting(tiny_base: Path) -> ToolCaller:
    tokenizer = CountingTokenizer(tiny_base)
    runtime = ScriptedRuntime(tokenizer)
    runtime.context_tokens = 2016
    return ToolCaller(runtime, tokenizer, TOOLS)


def fitted(caller: ToolCaller, messages: list[Message]) -> str:
    return fit(caller, Asked(tuple(messages), (), Choice.AUTO, 200, stream=False), TOOLS, 400).text


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def counted(caller: ToolCaller) -> int:
    assert isinstance(caller.tokenizer, CountingTokenizer)
    return caller.tokenizer.characters


def test_what_is_left_out_is_not_encoded(counting: ToolCaller) -> None:
    """Each step of a search encoded half of the conversation, which stopped the server for seconds."""
    kept = fitted(counting, [user(f"question {number} " + "word " * 100) for number in range(4000)])
    assert "question 3999" in kept
    assert "question 3900" not in kept
    assert counted(counting) < 50_000  # of 2 million


def test_many_short_messages_take_no_memory(counting: ToolCaller) -> None:
    """Each way to shorten them was a list: of 100,000 messages 80 GB."""
    assert fitted(counting, [user("a")] * 100_000).count("a") > 100


@pytest.mark.parametrize("role", ["user", "tool"])
def test_long_message_is_not_encoded_whole(counting: ToolCaller, role: str) -> None:
    old = [user("old"), {"role": "assistant", "content": "yes"}, {"role": role, "content": "word " * 800_000}]
    kept = fitted(counting, [*old, user("new")])
    assert kept.endswith("new")
    assert ("word" in kept) == (role == "tool")  # a result is cut
    assert counted(counting) < 400_000


def test_too_long_last_words_are_refused_unread(counting: ToolCaller) -> None:
    with pytest.raises(TooLongError, match=r"4000000 characters and a reply of 200 tokens .* 2016 tokens"):
        fitted(counting, [user("word " * 800_000)])
    assert counted(counting) < 10_000


def test_too_many_tools_are_refused_unread(counting: ToolCaller) -> None:
    tools = tuple(Tool(f"T{number}", "word " * 100, {"type": "object"}) for number in range(1000))
    with pytest.raises(TooLongError, match=r"tools of 5\d{5} characters do not fit the context of 2016 tokens"):
        fit(counting, Asked((user("x"),), tools, Choice.AUTO, 200, stream=False), tools, 400)
    assert counted(counting) == 0


def test_as_much_as_fits_is_kept(counting: ToolCaller) -> None:
    """One message more, and it would not fit."""
    messages = [user(f"{number} " + "word " * 50) for number in range(100)]
    kept = fitted(counting, messages).count("word") // 50
    counting.encode(messages[-kept:], TOOLS, 200)
    with pytest.raises(TooLongError, match="do not fit"):
        counting.encode(messages[-kept - 1 :], TOOLS, 200)


def test_nested_json_is_a_mistake_of_the_client(counting: ToolCaller, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read or write it raised RecursionError, which was answered as 500."""
    assert parse_call('<tool_call>{"name": "Read", "arguments": ' + "[" * 6000) is None

    def recurse(*_: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(counting, "prompt", recurse)
    engine = Engine(lambda: counting, 1, 400)
    with pytest.raises(ValueError, match="nested too deep"):
        engine.fit(engine.wait_until_loaded(), Asked((user("a"),), (), Choice.AUTO, 9, stream=False))
    engine.stop()
    engine.join(5)


def test_usage_tells_what_of_prefix_and_conversation_was_cached() -> None:
    piece = Piece("", 10, 100, prefix_kept=True, kept_tokens=4)
    keys = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    for prefix_kept, expected in ((True, [6, 104, 0]), (False, [6, 4, 100])):
        found = anthropic_wire.usage(replace(piece, prefix_kept=prefix_kept))
        assert [found[key] for key in keys] == expected
    told = openai_wire.usage(piece)
    assert told["prompt_tokens"] == 110
    assert told["prompt_tokens_details"] == {"cached_tokens": 104}

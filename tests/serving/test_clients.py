"""The clients people have, unchanged but for the address."""

import json
from typing import Any

import anthropic
import openai
import pytest

from tests.serving.conftest import Serve
from tests.serving.test_server import ASK, OPENAI_ASK


def test_anthropic_client(serve: Serve) -> None:
    client: Any = anthropic.Anthropic(base_url=serve().url, api_key="none")
    whole = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        (block,) = message.content
        assert block.type == "tool_use"
        assert (block.name, block.input) == ("Read", {"file_path": "src/a.py"})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens > 0
    assert kinds.count("content_block_start") == 1
    assert client.models.list().data[0].id == client.models.retrieve("tool-caller").id == "tool-caller"
    with pytest.raises(anthropic.NotFoundError, match="the model here is 'tool-caller'"):
        client.models.retrieve("another")
    assert client.messages.count_tokens(model="m", messages=ASK["messages"]).input_tokens > 0


def test_anthropic_client_answers_with_a_result(serve: Serve) -> None:
    client: Any = anthropic.Anthropic(base_url=serve().url, api_key="none")
    call = client.messages.create(**ASK)
    result = {"type": "tool_result", "tool_use_id": call.content[0].id, "content": [{"type": "text", "text": "x = 1"}]}
    turns = [*ASK["messages"], {"role": "assistant", "content": call.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**ASK | {"messages": turns})
    assert answer.content[0].text == "It said: x = 1"
    assert answer.stop_reason == "end_turn"


def test_anthropic_tool_choice(serve: Serve) -> None:
    client: Any = anthropic.Anthropic(base_url=serve().url, api_key="none")
    echo: dict[str, Any] = {
        "name": "Stop",
        "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    small_talk = ASK | {"messages": [{"role": "user", "content": "hello"}], "tools": [*ASK["tools"], echo]}
    assert client.messages.create(**small_talk).content[0].type == "text"
    forced = client.messages.create(**small_talk, tool_choice={"type": "tool", "name": "Stop"})
    assert (forced.content[0].name, forced.content[0].input) == ("Stop", {})
    some = client.messages.create(**ASK | {"messages": small_talk["messages"]}, tool_choice={"type": "any"})
    assert (some.stop_reason, some.content[0].name) == ("tool_use", "Read")
    silent = client.messages.create(**ASK, tool_choice={"type": "none"})
    assert silent.content[0].type == "text"


def test_openai_client(serve: Serve) -> None:
    client: Any = openai.OpenAI(base_url=serve().url + "/v1", api_key="none")
    whole = client.chat.completions.create(**OPENAI_ASK)
    call = whole.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("Read", {"file_path": "src/a.py"})
    assert whole.choices[0].finish_reason == "tool_calls"
    assert client.models.retrieve("tool-caller") == client.models.list().data[0]
    chunks = list(client.chat.completions.create(**OPENAI_ASK, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    assert parts[0].function.name == "Read"
    assert json.loads("".join(part.function.arguments or "" for part in parts)) == {"file_path": "src/a.py"}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    text = client.chat.completions.create(**OPENAI_ASK | {"messages": [{"role": "user", "content": "hello"}]})
    assert text.choices[0].message.content == "You wrote: hello"


def test_openai_tool_choice(serve: Serve) -> None:
    client: Any = openai.OpenAI(base_url=serve().url + "/v1", api_key="none")
    small_talk = OPENAI_ASK | {"messages": [{"role": "user", "content": "hello"}]}
    assert client.chat.completions.create(**small_talk).choices[0].message.tool_calls is None
    named = {"type": "function", "function": {"name": "Read"}}
    for choice in ("required", named):
        reply = client.chat.completions.create(**small_talk, tool_choice=choice).choices[0]
        assert (reply.finish_reason, reply.message.tool_calls[0].function.name) == ("tool_calls", "Read")
    assert client.chat.completions.create(**OPENAI_ASK, tool_choice="none").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="Launch"):
        client.chat.completions.create(**OPENAI_ASK, tool_choice={"type": "function", "function": {"name": "Launch"}})


def test_half_a_character_is_refused(serve: Serve) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "Read", "arguments": '{"file_path": "\\ud800"}'}}
    turns = [*OPENAI_ASK["messages"], {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "c1", "content": "x"})
    client: Any = openai.OpenAI(base_url=serve().url + "/v1", api_key="none")
    with pytest.raises(openai.BadRequestError, match="arguments of Read"):
        client.chat.completions.create(**OPENAI_ASK | {"messages": turns})


def test_openai_client_answers_with_a_result(serve: Serve) -> None:
    client: Any = openai.OpenAI(base_url=serve().url + "/v1", api_key="none")
    call = client.chat.completions.create(**OPENAI_ASK).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "x = 1"}
    turns = [*OPENAI_ASK["messages"], call.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**OPENAI_ASK | {"messages": turns})
    assert answer.choices[0].message.content == "It said: x = 1"

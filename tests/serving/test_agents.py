"""Whole agents against the server: the Claude Agent SDK with its own CLI, and MCP clients."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ResultMessage,
    TextBlock,
    ToolUseBlock,
    create_sdk_mcp_server,
    query,
    tool,
)
from mcp import Client, StdioServerParameters

from pipeline.serve_mcp import build
from tests.serving.conftest import ROOT, Serve


@tool("echo", "Say a text again.", {"text": str})
async def echo(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": f"box says {arguments['text']}"}]}


def agent_environment(url: str, home: Path) -> dict[str, str]:
    """Every variable that the CLI reads and could lead it elsewhere."""
    return {
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_MODEL": "tool-caller",
        "ANTHROPIC_SMALL_FAST_MODEL": "tool-caller",
        "CLAUDE_CONFIG_DIR": str(home / ".claude"),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "8192",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1024",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "MAX_THINKING_TOKENS": "0",
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


async def converse(url: str, home: Path, prompt: str) -> tuple[list[ToolUseBlock], str]:
    """The calls an agent made, and what it said at last."""
    options = ClaudeAgentOptions(
        model="tool-caller",
        system_prompt="You are an agent.",
        tools=["Read", "Write", "Edit", "Bash", "Grep", "Glob"],
        allowed_tools=["Bash", "mcp__box__echo"],
        mcp_servers={"box": create_sdk_mcp_server("box", tools=[echo])},
        setting_sources=[],
        max_turns=4,
        cwd=home,
        env=agent_environment(url, home),
    )
    calls: list[ToolUseBlock] = []
    text = ""
    async for message in query(prompt=prompt, options=options):
        if isinstance(message, AssistantMessage):
            calls += [block for block in message.content if isinstance(block, ToolUseBlock)]
            text = "".join(block.text for block in message.content if isinstance(block, TextBlock)) or text
        if isinstance(message, ResultMessage):
            assert not message.is_error, message.result
    return calls, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "name", "said"),
    [
        ("run echo from-bash-$((20+22))", "Bash", "from-bash-42"),
        ("echo ping", "mcp__box__echo", "box says ping"),
    ],
)
def test_agent_sdk_makes_the_call_and_gets_its_result(
    serve: Serve, tmp_path: Path, prompt: str, name: str, said: str
) -> None:
    calls, text = asyncio.run(converse(serve().url, tmp_path, prompt))
    assert [call.name for call in calls] == [name]
    assert said in text


def test_mcp_client_gets_a_proposal(serve: Serve) -> None:
    async def ask() -> Any:
        async with Client(build(serve().engine, 200)) as client:
            tools = await client.list_tools()
            assert [found.name for found in tools.tools] == ["propose_call"]
            return await client.call_tool("propose_call", {"request": "read a.py"})

    found = asyncio.run(ask())
    assert not found.is_error
    proposal = found.structured_content
    assert (proposal["tool"], proposal["arguments"]) == ("Read", {"file_path": "a.py"})
    assert 0 < proposal["confidence"] <= 1


def mcp_command(model: Path, *more: str) -> list[str]:
    settings = [f"serve.model={model}", "serve.max_new_tokens=20", f"paths.tools={ROOT / 'data/tools.json'}", *more]
    return [sys.executable, "-m", "pipeline.serve_mcp", *settings]


async def propose(server: Any) -> Any:
    async with Client(server) as client:
        return await client.call_tool("propose_call", {"request": "read a.py"})


@pytest.mark.slow
def test_mcp_host_starts_the_server_itself(tiny_fused: Path, tmp_path: Path) -> None:
    """Over stdio, with a model, in a folder of the host's: nothing but the protocol may be on its standard output."""
    command, *args = mcp_command(tiny_fused)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = asyncio.run(propose(StdioServerParameters(command=command, args=args, env=environment, cwd=str(tmp_path))))
    assert not found.is_error
    assert found.structured_content["milliseconds"] > 0


@pytest.mark.slow
def test_mcp_over_http(tiny_fused: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = mcp_command(tiny_fused, "mcp.transport=streamable-http", f"mcp.port={port}")
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        try:
            end = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None
                assert time.monotonic() < end, "it did not start in time"
                time.sleep(0.1)
            found = asyncio.run(propose(f"http://127.0.0.1:{port}/mcp"))
        finally:
            process.terminate()
    assert not found.is_error
    assert found.structured_content["milliseconds"] > 0

"""Serve a model folder over MCP: one tool that proposes the tool call for a request. Not a stage.

python -m pipeline.serve_mcp serve.model=models/int8                     (stdio, for a host that starts it)
python -m pipeline.serve_mcp serve.model=models/int8 mcp.transport=streamable-http
"""

import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from mcp.server.mcpserver import MCPServer
from omegaconf import DictConfig
from pydantic import BaseModel

from pipeline import config
from pipeline.runtime.generation import Choice, Techniques
from pipeline.serve import KEY, ServeConfig, is_loopback, start_engine
from pipeline.serving.engine import Asked, Engine

TRANSPORTS = ("stdio", "streamable-http")


@dataclass
class McpConfig:
    transport: str
    port: int

    def __post_init__(self) -> None:
        config.require_one_of("mcp.transport", self.transport, TRANSPORTS)
        config.require_range("mcp.port", self.port, 0, 65535)


@dataclass
class Params:
    paths: config.Paths
    techniques: Techniques
    serve: ServeConfig
    mcp: McpConfig


class Proposal(BaseModel):
    tool: str | None  # None: no call fits, or the request lacks something
    arguments: dict[str, Any]
    text: str  # the reply if there is no call
    confidence: float  # probability the model gave this whole reply
    milliseconds: float


def build(engine: Engine, max_new_tokens: int) -> MCPServer:
    server = MCPServer("tool-caller", instructions="A small model that proposes tool calls. It executes nothing.")

    @server.tool(description="Propose the tool call that answers a request, with the model's confidence in it.")
    async def propose_call(request: str) -> Proposal:
        start = time.perf_counter()
        messages = ({"role": "user", "content": request},)
        piece = await engine.whole(Asked(messages, (), Choice.AUTO, max_new_tokens, stream=False))
        call = piece.call
        return Proposal(
            tool=call.name if call else None,
            arguments=call.arguments if call else {},
            text="" if call or piece.is_cut_call else piece.text,
            confidence=piece.confidence,
            milliseconds=1e3 * (time.perf_counter() - start),
        )

    return server


def run(params: Params) -> None:
    """Raises ValueError if others can reach serve.host over HTTP: no key is checked here."""
    if params.mcp.transport != "stdio" and not is_loopback(params.serve.host):
        raise ValueError(
            f"serve.host is {params.serve.host}: MCP is served on loopback only, {KEY} is not checked here"
        )
    engine = start_engine(params.paths.tools, params.techniques, params.serve)
    server = build(engine, params.serve.max_new_tokens)
    if params.mcp.transport == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host=params.serve.host, port=params.mcp.port)


@config.main
def main(raw: DictConfig) -> None:
    # Standard output belongs to the protocol.
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(config.load(raw, Params))


if __name__ == "__main__":
    main()

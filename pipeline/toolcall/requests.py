"""Files with one request per line, in this project's form (data/requests/README.md) or OpenAI's chat form."""

from pathlib import Path

from pipeline import files
from pipeline.toolcall.conversation import Request, parse_request
from pipeline.toolcall.openai_chat import from_openai, is_openai
from pipeline.toolcall.tool import Tool


def read_requests(path: Path, tools: tuple[Tool, ...], n: int | None = None) -> list[Request]:
    """All requests, or at most `n`, evenly spaced; `tools` are those of the tools file.

    Raises ValueError naming file and line of a request that breaks the format or repeats an id.
    """
    requests: dict[str, Request] = {}
    for where, value in files.read_jsonl(path) if n is None else files.read_spread(path, n):
        request = parse_request(from_openai(value, tools, where) if is_openai(value) else value, tools, where)
        if request.id in requests:
            raise ValueError(f"{where}: id: {request.id!r} stands in the file twice")
        requests[request.id] = request
    if not requests:
        raise ValueError(f"{path}: holds no request")
    return list(requests.values())

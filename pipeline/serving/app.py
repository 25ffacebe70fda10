"""The HTTP server: both wire formats over one engine, limits, metrics, health."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.serving import anthropic_wire, openai_wire
from pipeline.serving.engine import Asked, BusyError, DrainingError, Engine, Piece
from pipeline.serving.metrics import Metrics
from pipeline.serving.reply_reader import ReplyReader
from pipeline.toolcall.tool import Tool

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    body_bytes: int
    read_timeout_s: float  # for a client to send its request
    request_timeout_s: float  # from a request to its whole reply, queueing included
    max_new_tokens: int


class Stream(Protocol):
    def events(self, piece: Piece, text: str) -> Iterator[str]: ...


@dataclass(frozen=True)
class Api:
    """One wire format."""

    body: type[BaseModel]
    asked: Callable[[Any, tuple[Tool, ...], int], Asked]
    whole: Callable[[Piece, str], dict[str, Any]]
    stream: Callable[[Any], Stream]
    error: Callable[[int, str], dict[str, Any]]
    failure_event: Callable[[int, str], str]
    busy_status: int


ANTHROPIC = Api(
    anthropic_wire.MessagesBody,
    anthropic_wire.asked,
    anthropic_wire.message,
    lambda body: anthropic_wire.Stream(body.model),
    anthropic_wire.error,
    anthropic_wire.failure_event,
    529,
)
OPENAI = Api(
    openai_wire.ChatBody,
    openai_wire.asked,
    openai_wire.completion,
    lambda body: openai_wire.Stream(body.model, bool(body.stream_options and body.stream_options.include_usage)),
    openai_wire.error,
    openai_wire.failure_event,
    429,
)


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Server:
    engine: Engine
    model_name: str
    limits: Limits
    api_key: str | None
    log_contents: bool = False
    gpu: Callable[[], float] | None = None  # its utilisation
    open_requests: int = 0
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.gpu)

    def app(self) -> Starlette:
        async def messages(request: Request) -> Response:
            return await self.respond(request, ANTHROPIC)

        async def chat(request: Request) -> Response:
            return await self.respond(request, OPENAI)

        return Starlette(
            routes=[
                Route("/v1/messages", messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.show_metrics),
                Route("/openapi.json", self.openapi),
            ],
            exception_handlers={HTTPException: self._http_error, Exception: self._fault},
        )

    async def respond(self, request: Request, api: Api) -> Response:
        start = time.perf_counter()
        self.open_requests += 1
        streaming = False
        try:
            body: Any = await self._body(request, api.body)
            async with asyncio.timeout(self.limits.request_timeout_s):
                asked = await self._asked(api, body)
                if asked.stream:
                    reply = _Reply(self, api, body, asked, start)
                    await _unless_gone(request, reply.begin())
                    streaming = True
                    return reply
                piece = await _unless_gone(request, self.engine.whole(asked))
        except (
            RefusedError,
            BusyError,
            DrainingError,
            ValueError,
            TimeoutError,
            RuntimeError,
            MemoryError,
            ClientDisconnect,
        ) as error:
            return self._failed(error, api, start)
        finally:
            if not streaming:
                self.open_requests -= 1
        self.finished(piece, asked, start)
        headers = {"x-confidence": f"{piece.confidence:.4f}"}
        return JSONResponse(api.whole(piece, body.model), headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """Counts what /v1/messages would keep of the conversation."""
        start = time.perf_counter()
        self.open_requests += 1
        try:
            body: Any = await self._body(request, anthropic_wire.CountBody)
            caller = self.engine.wait_until_loaded()
            async with asyncio.timeout(self.limits.request_timeout_s):
                asked = await self._asked(ANTHROPIC, body)
                counting = asyncio.to_thread(_reading, lambda: self.engine.fit(caller, asked))
                prompted = await _unless_gone(request, counting)
        except (RefusedError, BusyError, TimeoutError, ClientDisconnect) as error:
            return self._failed(error, ANTHROPIC, start)
        finally:
            self.open_requests -= 1
        return JSONResponse({"input_tokens": len(prompted.prefix) + len(prompted.asked)})

    async def models(self, request: Request) -> Response:
        del request
        ends = {"first_id": self.model_name, "last_id": self.model_name, "has_more": False}
        return JSONResponse({"object": "list", "data": [self._model()], **ends})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model_name:
            raise HTTPException(404, f"the model here is {self.model_name!r}")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        del request
        alive = self.engine.alive
        return JSONResponse({"status": "alive" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        del request
        ready = self.engine.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        del request
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        del request
        return JSONResponse(openapi(self.model_name))

    def finished(self, piece: Piece, asked: Asked, start: float) -> None:
        seconds = time.perf_counter() - start
        self.metrics.whole.observe(seconds)
        self.metrics.count(piece, {tool.name for tool in self._own()})
        line: dict[str, Any] = {"status": 200, "s": round(seconds, 4), "new_tokens": piece.new_tokens}
        if self.log_contents:
            line |= {"asked": asked.messages[-1]["content"], "reply": piece.text}
        log.info(json.dumps(line, ensure_ascii=False))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "type": "model",
            "display_name": self.model_name,
            "created": 0,
            "created_at": "1970-01-01T00:00:00Z",
            "owned_by": "you",
        }

    async def _asked(self, api: Api, body: Any) -> Asked:
        """In another thread: checking a hundred tools takes a second, in which others are answered."""
        return await asyncio.to_thread(_reading, lambda: api.asked(body, self._own(), self.limits.max_new_tokens))

    def _own(self) -> tuple[Tool, ...]:
        return self.engine.caller.tools if self.engine.caller else ()

    async def _body(self, request: Request, kind: type[T]) -> T:
        """Raises RefusedError if the key is wrong, the server is not ready, or the body is too large, too slow or
        malformed; BusyError if the queue is full.
        """
        self._authorize(request)
        if not self.engine.ready:
            raise RefusedError(503, "the server is starting or about to stop")
        try:
            async with asyncio.timeout(self.limits.read_timeout_s):
                content = bytearray()
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > self.limits.body_bytes:
                        raise RefusedError(413, f"the request has more than {self.limits.body_bytes} bytes")
        except TimeoutError as error:
            raise RefusedError(
                408, f"the request took longer than {self.limits.read_timeout_s:g} s to arrive"
            ) from error
        self.engine.require_place()
        try:
            return kind.model_validate_json(bytes(content))  # type: ignore[attr-defined, no-any-return]
        except ValidationError as error:
            # If no member of a union fits, the error deepest in the body says most.
            found = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
            where = ".".join(map(str, found["loc"]))
            raise RefusedError(400, f"{where}: {found['msg']}" if where else found["msg"]) from error

    def _authorize(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [request.headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        right = [hmac.compare_digest(key.encode(), self.api_key.encode()) for key in given]
        if not any(right):
            raise RefusedError(401, "a valid key is needed, as x-api-key or Authorization: Bearer")

    def _failed(self, error: Exception, api: Api, start: float) -> Response:
        status, message = self.failure(error, api, start)
        headers = {"retry-after": "1"} if status in (429, 503, 529) else None
        return JSONResponse(api.error(status, message), status, headers)

    def failure(self, error: Exception, api: Api, start: float) -> tuple[int, str]:
        """The status and message for the client; counts and logs them."""
        message = str(error)
        match error:
            case RefusedError():
                status = error.status
            case BusyError():
                status = api.busy_status
            case DrainingError():
                status = 503
            case ClientDisconnect():
                status, message = 499, "the client has gone"
            case TimeoutError():
                status, message = 504, f"no reply within {self.limits.request_timeout_s:g} s"
            case ValueError():
                status = 400
            case _:
                status, message = 500, "the model failed"
                log.error("the model failed", exc_info=error)
        self.metrics.errors.labels(str(status)).inc()
        log.info(json.dumps({"status": status, "s": round(time.perf_counter() - start, 4), "error": message}))
        return status, message

    async def _fault(self, request: Request, error: Exception) -> Response:
        """The server's own fault: counted, and answered in the format of the client's API."""
        del error  # Starlette logs it
        api = OPENAI if "chat" in request.url.path else ANTHROPIC
        self.metrics.errors.labels("500").inc()
        return JSONResponse(api.error(500, "the server failed"), 500)

    async def _http_error(self, request: Request, error: Any) -> Response:
        """404 and 405."""
        api = OPENAI if "chat" in request.url.path else ANTHROPIC
        self.metrics.errors.labels(str(error.status_code)).inc()
        return JSONResponse(api.error(error.status_code, error.detail), error.status_code, error.headers)


class _Reply(Response):
    """A streamed reply: its place in the engine is freed as soon as the client disconnects."""

    def __init__(self, server: Server, api: Api, body: Any, asked: Asked, start: float) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._server, self._api, self._asked, self._start = server, api, asked, start
        self._stream, self._reader = api.stream(body), ReplyReader()
        self._pieces: AsyncGenerator[Piece, None] = server.engine.answer(asked)
        self._first: list[Piece] = []
        self._told = False  # the outcome is logged

    async def begin(self) -> None:
        """Wait for the first piece. A failure until then still gets its own status."""
        self._first.append(await anext(self._pieces))
        self._server.metrics.first_byte.observe(time.perf_counter() - self._start)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not self._told:
                self._failed(ClientDisconnect())
            elif sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._pieces.aclose()
            self._server.open_requests -= 1

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        left_s = self._server.limits.request_timeout_s - (time.perf_counter() - self._start)
        try:
            async with asyncio.timeout(left_s):
                for piece in self._first:
                    await self._say(piece, send)
                async for piece in self._pieces:
                    await self._say(piece, send)
        except (ValueError, TimeoutError, RuntimeError, MemoryError) as error:
            await _chunk(send, self._api.failure_event(*self._failed(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _say(self, piece: Piece, send: Send) -> None:
        read = self._reader.read(piece)
        if events := "".join(self._stream.events(piece, read)):
            await _chunk(send, events)
        if piece.last:
            self._told = True
            self._server.finished(piece, self._asked, self._start)

    def _failed(self, error: Exception) -> tuple[int, str]:
        self._told = True
        return self._server.failure(error, self._api, self._start)


async def _chunk(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Raises ClientDisconnect, and cancels the work, if the client disconnects before it is done."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _reading(read: Callable[[], T]) -> T:
    try:
        return read()
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, str(error)) from error


def openapi(model: str) -> dict[str, Any]:
    def operation(api: Api, summary: str) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{api.body.__name__}"}
        answers = {
            status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
            for status, text in {"200": "the reply", "4XX": "why not", "5XX": "why not"}.items()
        }
        content = {"application/json": {"schema": schema}}
        return {
            "post": {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": answers}
        }

    schemas: dict[str, Any] = {}
    for api in (ANTHROPIC, OPENAI):
        schema = api.body.model_json_schema(ref_template=f"#/components/schemas/{api.body.__name__}.{{model}}")
        for name, inner in schema.pop("$defs", {}).items():
            schemas[f"{api.body.__name__}.{name}"] = inner
        schemas[api.body.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": "1"},
        "paths": {
            "/v1/messages": operation(ANTHROPIC, "Anthropic's Messages API"),
            "/v1/chat/completions": operation(OPENAI, "OpenAI's chat completions"),
        },
        "components": {"schemas": schemas},
    }

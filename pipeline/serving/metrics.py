"""The Prometheus metrics at /metrics."""

from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.serving.engine import Engine, Piece

STATUSES = (400, 401, 404, 405, 408, 413, 429, 499, 500, 503, 504, 529)  # of errors
SECONDS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Metrics:
    def __init__(self, engine: Engine, gpu: Callable[[], float] | None = None) -> None:
        """`gpu`: reads its utilisation, from 0 to 1; None without a GPU."""
        self.registry = CollectorRegistry()
        self.first_byte = Histogram(
            "toolcaller_first_piece_seconds",
            "From a request to the first piece of its reply (streams only)",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "toolcaller_reply_seconds", "From a request to its whole reply", buckets=SECONDS, registry=self.registry
        )
        self._tokens = Counter("toolcaller_tokens", "Tokens", ["kind"], registry=self.registry)
        self._calls = Counter("toolcaller_calls", "Calls proposed", ["tool"], registry=self.registry)
        self._texts = Counter("toolcaller_texts", "Replies without a call", registry=self.registry)
        self._prefixes = Counter("toolcaller_prefixes", "Tool lists, by cache", ["cache"], registry=self.registry)
        self._cut = Counter("toolcaller_cut_replies", "Replies cut at their length limit", registry=self.registry)
        self._changed = Counter(
            "toolcaller_changed_tokens",
            "Tokens that the model would not have chosen: the grammar or a likelier call did",
            registry=self.registry,
        )
        batch = Histogram(
            "toolcaller_step_requests",
            "Requests answered in one step of the model",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
            registry=self.registry,
        )
        engine.on_step = batch.observe
        self.errors = Counter("toolcaller_errors", "Requests refused or failed", ["status"], registry=self.registry)
        for status in STATUSES:  # rate() sees the first error only if the counter was 0 before it
            self.errors.labels(str(status))
        waiting = Gauge("toolcaller_queue_length", "Requests that wait", registry=self.registry)
        waiting.set_function(lambda: engine.queue_length)
        used = Gauge("toolcaller_gpu_utilisation_ratio", "Of the GPU; 0 without one", registry=self.registry)
        used.set_function(gpu or (lambda: 0.0))
        memory = Gauge("toolcaller_resident_bytes", "Resident memory of the process", registry=self.registry)
        memory.set_function(lambda: float(psutil.Process().memory_info().rss))

    def count(self, piece: Piece, known: set[str]) -> None:
        """Calls of tools that are not in `known` are counted together, since clients choose their names."""
        self._tokens.labels("prompt").inc(piece.prompt_tokens - piece.kept_tokens)
        self._tokens.labels("kept").inc(piece.kept_tokens)
        self._tokens.labels("new").inc(piece.new_tokens)
        self._prefixes.labels("hit" if piece.prefix_kept else "miss").inc()
        if not piece.finished:
            self._cut.inc()
        self._changed.inc(piece.changed)
        if piece.call:
            self._calls.labels(piece.call.name if piece.call.name in known else "other").inc()
        else:
            self._texts.inc()

    def page(self) -> bytes:
        return bytes(generate_latest(self.registry))

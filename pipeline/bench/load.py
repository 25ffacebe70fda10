"""Load from concurrent clients, each of which sends its next request when its last is answered."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    concurrency: int
    wall_s: float
    call_s: list[float]  # of each answered call, waiting included
    errors: int


async def serve(answer: Callable[[int], Awaitable[None]], concurrency: int, calls: int) -> Served:
    """Answer `calls` calls, numbered from 0, from `concurrency` clients.

    A call that raises ValueError, RuntimeError or MemoryError counts as an error, and its time is left out.
    """
    numbers = iter(range(calls))
    call_s: list[float] = []

    async def client() -> None:
        for number in numbers:
            start = time.perf_counter()
            try:
                await answer(number)
            except (ValueError, RuntimeError, MemoryError):
                continue
            call_s.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return Served(concurrency, time.perf_counter() - start, call_s, calls - len(call_s))

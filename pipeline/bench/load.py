"""Load from concurrent clients: each sends its next request when its last is answered."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    concurrency: int
    wall_s: float
    call_s: list[float]  # of each call that was answered, waiting included
    errors: int


def serve(call: Callable[[int], None], concurrency: int, calls: int) -> Served:
    """Make `calls` calls, numbered from 0, from `concurrency` threads.

    A call that raises ValueError or RuntimeError is counted as an error and its time left out.
    """
    numbers = iter(range(calls))
    lock = threading.Lock()
    call_s: list[float] = []
    errors = 0

    def client() -> None:
        nonlocal errors
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            start = time.perf_counter()
            try:
                call(number)
            except (ValueError, RuntimeError):
                with lock:
                    errors += 1
            else:
                with lock:
                    call_s.append(time.perf_counter() - start)

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return Served(concurrency, time.perf_counter() - start, call_s, errors)

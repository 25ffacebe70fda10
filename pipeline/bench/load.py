"""Load from concurrent clients: each sends its next request when its last is answered."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue


@dataclass(frozen=True)
class Served:
    concurrency: int
    wall_s: float
    call_s: list[float]  # of each call that was answered, waiting included
    errors: int


def serve(answer: Callable[[int], None], concurrency: int, calls: int) -> Served:
    """Answer `calls` calls, numbered from 0, of `concurrency` clients, one at a time and on this thread.

    Models run at half their speed on a thread that did not load them (PyTorch and ONNX Runtime alike).
    A call that raises ValueError or RuntimeError is counted as an error and its time left out.
    """
    waiting: SimpleQueue[tuple[int, Future[None]]] = SimpleQueue()
    numbers = iter(range(calls))
    lock = threading.Lock()
    call_s: list[float] = []

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            start = time.perf_counter()
            answered = Future[None]()
            waiting.put((number, answered))
            if answered.exception() is None:
                call_s.append(time.perf_counter() - start)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for _ in range(calls):
        _settle(answer, *waiting.get())
    for thread in clients:
        thread.join()
    return Served(concurrency, time.perf_counter() - start, call_s, calls - len(call_s))


def _settle(answer: Callable[[int], None], number: int, answered: Future[None]) -> None:
    try:
        answer(number)
    except (ValueError, RuntimeError) as error:
        answered.set_exception(error)
    else:
        answered.set_result(None)

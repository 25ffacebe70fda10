"""A cache of what was made for the last few tool lists, so that it is not made again for each request."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most `limit` values; the least recently used goes first. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: dict[Key, Value] = {}  # the most recently used last
        self._lock = threading.Lock()  # not held while a value is made: two threads may make the same one

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        with self._lock:
            found = self._values.pop(key, None)
        value = make() if found is None else found
        self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value
            if len(self._values) > self.limit:
                del self._values[next(iter(self._values))]

    def take(self, key: Key) -> Value | None:
        """Removes the value, if there is one, and returns it."""
        with self._lock:
            return self._values.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._values

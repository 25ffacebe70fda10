from collections.abc import Callable

import pytest

from pipeline.runtime.recent import Recent


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    made: list[str] = []
    recent = Recent[str, str](2)

    def make(key: str) -> Callable[[], str]:
        return lambda: made.append(key) or key.upper()  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c", "a", "b"):  # c puts b out, then b puts c out
        assert recent.get(key, make(key)) == key.upper()
    assert made == ["a", "b", "c", "b"]
    assert ("a" in recent, "b" in recent, "c" in recent) == (True, True, False)


def test_nothing_is_kept_where_the_limit_is_0() -> None:
    recent = Recent[str, int](0)
    assert recent.get("a", lambda: 1) == 1
    assert recent.get("a", lambda: 2) == 2


def test_nothing_is_kept_of_what_could_not_be_made() -> None:
    recent = Recent[str, int](1)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert "a" not in recent
    assert recent.get("a", lambda: 3) == 3

import random

import pytest

from pipeline.toolcall.slots import Draw, check_slots


def test_draw_is_the_same_within_a_request_and_another_with_a_number() -> None:
    slots = {"n": [{"v": n} for n in range(1000)]}
    filled = Draw(slots, random.Random(0), "x:1").fill(["{{n.v}}", "is {{n.v}}", "{{n#2.v}}"])
    assert filled[1] == f"is {filled[0]}"
    assert isinstance(filled[0], int)
    assert filled[2] != filled[0]


@pytest.mark.parametrize("seed", range(8))
def test_draws_differ_while_there_are_others(seed: int) -> None:
    first, second, third = Draw({"n": ["a", "b"]}, random.Random(seed), "x:1").fill(["{{n}}", "{{n#2}}", "{{n#3}}"])
    assert {first, second} == {"a", "b"}
    assert third in "ab"


def test_a_line_that_is_repeated_to_weigh_more_weighs_as_much_in_the_second_draw() -> None:
    """It was left out as a whole, so second draws were nearly always the rare literal lines."""
    slots = {"file": ["{{stem}}.py"] * 9 + ["Makefile"], "stem": ["a", "b", "c"]}
    pairs = [Draw(slots, random.Random(seed), "x:1").fill(["{{file}}", "{{file#2}}"]) for seed in range(200)]
    assert sum(second == "Makefile" for _, second in pairs) < 40
    assert all(first != second for first, second in pairs)


def test_draw_names_an_unknown_slot() -> None:
    with pytest.raises(ValueError, match="x:1: no slot 'path'"):
        Draw({}, random.Random(0), "x:1").fill("show {{path}}")


@pytest.mark.parametrize("text", ["{{day2}}", "{{Day}}", "{{file-name}}", "{{day#two}}", "{{day.}}"])
def test_what_looks_like_a_slot_and_is_none_is_refused(text: str) -> None:
    """It was left in the request as text."""
    with pytest.raises(ValueError, match=rf"x:1: {text} is no slot: expected .* of a-z and _"):
        check_slots({"messages": [{"content": f"show {text}"}]}, "x:1")


def test_slots_and_braces_of_texts_are_let_through() -> None:
    check_slots(
        {"a": ["{{ url }} {{}} {{.Names}} {{day}} {{day#2}}", '{"a":{"b":{}}}'], "b": "{{day#2.long_name}}"}, "x:1"
    )

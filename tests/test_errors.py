from __future__ import annotations

import pytest

from horsehuman.errors import (
    HorseHumanError,
    check_choice,
    check_flag,
    check_number,
    check_widths,
    closest,
    printable,
)


@pytest.mark.parametrize(
    ("value", "kind", "bounds"),
    [
        (1, float, {"at_least": 0, "below": 1}),
        (-0.1, float, {"at_least": 0}),
        (0, float, {"above": 0}),
        (5, int, {"at_most": 4}),
        (1.5, int, {}),
        (True, int, {}),
        ("3", int, {}),
        (None, float, {}),
        (float("nan"), float, {}),
    ],
)
def test_numbers_out_of_bounds_are_refused(value: object, kind: type, bounds: dict) -> None:
    with pytest.raises(HorseHumanError, match=r"^data\.x=.* does not work: give a") as caught:
        check_number("data.x", value, kind, **bounds)
    assert "\n" not in str(caught.value)


def test_numbers_at_inclusive_bounds_are_accepted() -> None:
    check_number("x", 0, float, at_least=0, below=1)
    check_number("x", 4, int, at_least=0, at_most=4)
    check_number("x", -1.5, float, above=None)


def test_a_refused_number_is_told_its_bounds() -> None:
    with pytest.raises(HorseHumanError, match=r"^x=9 .*: give a whole number, at least 1 and at"):
        check_number("x", 9, int, at_least=1, at_most=4)
    with pytest.raises(HorseHumanError, match=r"^x='1' does not work: give a number$"):
        check_number("x", "1", float)


@pytest.mark.parametrize("value", [[], "32", 32, None, [8] * 65])
def test_lists_of_another_length_or_kind_are_refused(value: object) -> None:
    with pytest.raises(HorseHumanError, match="give a list of 1 to 64 whole numbers, such as"):
        check_widths("model.channels", value, at_least=1)


@pytest.mark.parametrize("width", [0, 2.5, 16_385, "8", True])
def test_widths_out_of_bounds_are_refused(width: object) -> None:
    check_widths("model.hidden", [])
    check_widths("model.channels", (1, 16_384), at_least=1)
    with pytest.raises(HorseHumanError, match=r"at least 1 and at most 16384$"):
        check_widths("model.channels", [8, width])


def test_check_flag_and_check_choice() -> None:
    check_flag("x", True)
    with pytest.raises(HorseHumanError, match="true or false"):
        check_flag("x", 1)
    with pytest.raises(HorseHumanError, match=r"did you mean box\?.*use box \| folder"):
        check_choice("data.source", "bix", ("box", "folder"))


def test_closest_is_empty_if_nothing_is_similar() -> None:
    assert closest("zzz", ["model", "data"]) == ""


def test_printable_escapes_to_one_line() -> None:
    assert printable("pferd - 馬.jpg") == "pferd - 馬.jpg"
    assert printable("a\nb") == r"'a\nb'"
    assert printable("\udcff.jpg") == r"'\udcff.jpg'"
    assert printable(b"run/events") == "run/events"


def test_closest_prefers_names_with_the_same_beginning() -> None:
    assert closest("val", ["train", "validation", "test", "all"]) == " (did you mean validation?)"
    assert closest("incepton", ["cnn", "inception"]) == " (did you mean inception?)"
    assert closest("", ["cnn"]) == ""

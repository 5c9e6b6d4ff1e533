from __future__ import annotations

from dfcli.system.words import close, closest, counted


def test_one_is_told_as_one() -> None:
    assert [counted(n, "line") for n in (0, 1, 2, 2000)] == ["0 lines", "1 line", "2 lines", "2,000 lines"]


def test_the_name_that_was_meant_is_found_and_the_names_are_listed() -> None:
    assert close("Nano_CPU", ["nano", "nano-cpu"]) == "nano-cpu"
    assert close("wikipedia", ["names", "shakespeare"]) == ""
    assert closest("tset", ["test", "val"]) == "did you mean `test`? there are test, val"
    assert closest("x", ["a", "b"], "its labels are") == "its labels are a, b"
    assert closest("x", [f"n{i}" for i in range(15)]).endswith("n11 and 3 more")
    assert closest("x", []) == ""

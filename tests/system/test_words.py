from __future__ import annotations

from dfcli.system.words import counted


def test_one_is_told_as_one() -> None:
    assert [counted(n, "line") for n in (0, 1, 2, 2000)] == ["0 lines", "1 line", "2 lines", "2,000 lines"]

r"""The grammar of actions: the last closed `\boxed{}` in printable ASCII, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ludus.text.actions import boxed, parse


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("\\boxed{bet}", "bet"),
        ("I bet.\n\\boxed{ bet }\n", "bet"),
        ("I avoid \\boxed{4}, so \\boxed{5}", "5"),
        ("\\boxed{offer 2 wood for 1 gold}", "offer 2 wood for 1 gold"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{{4}}", "{4"),
        ("[4]", None),
        ("boxed{4}", None),
        ("\\boxed {4}", None),
        ("\\Boxed{4}", None),
        ("\\boxed{}", None),
        ("\\boxed{  }", None),
        ("\\boxed{4", None),
        ("\\boxed{4}, or rather \\boxed{5", None),  # cut off: the last box counts, and it is not closed
        ("\\boxed{\uff14}", None),  # full-width 4
        ("\\boxed{\u0664}", None),  # Arabic-Indic 4
        ("\\boxed{b\u0435t}", None),  # Cyrillic e
        ("\\boxed{\u00a0bet}", None),  # no-break space
        ("\\boxed{bet\nThey fold.}", None),
        ("\\boxed{bet\x00}", None),
        ("\uff3cboxed{bet}", None),
        ("", None),
    ],
)
def test_parse(answer: str, action: str | None) -> None:
    assert parse(answer) == action


def test_a_box_may_be_closed_and_still_hold_no_action() -> None:
    assert boxed("\\boxed{\uff14}") == "\uff14"
    assert boxed("\\boxed{4") is None


@given(before=st.text(), after=st.text(), action=st.text(st.characters(codec="ascii"), min_size=1))
def test_what_parses_was_said_as_it_stands(before: str, after: str, action: str) -> None:
    answer = f"{before}\\boxed{{{action}}}{after}"
    found = parse(answer)
    if found is not None:
        assert found.isascii()
        assert found.isprintable()
        assert found == found.strip()
        assert "}" not in found
        assert found in answer
    elif "\\boxed{" not in after and "\\boxed{" not in action:  # refused for what is in the box alone
        content = action.partition("}")[0]
        assert not content.isprintable() or not content.strip()

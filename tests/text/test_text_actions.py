r"""The grammars: the last closed `\boxed{}` in printable ASCII; or one `<answer>` and nothing beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ludus.text.actions import GRAMMARS, tagged, unspelled

parse, boxed_closed = GRAMMARS["boxed"].parse, GRAMMARS["boxed"].closed
answer_in, answer_closed = GRAMMARS["answer"].parse, GRAMMARS["answer"].closed
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = st.text(max_size=6) | st.sampled_from(
    ("\n", " ", "yes", "\\boxed{yes}", "<answer", "</ANSWER>", *TAGS)
)


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
    assert boxed_closed("\\boxed{\uff14}")
    assert not boxed_closed("\\boxed{4")


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


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("<answer>bet</answer>", "bet"),
        ("\n <answer>\n bet\n</answer>\n", "bet"),
        ("<answer>Zwei Zeilen:\n\u00e9\U0001f600 {}</answer>", "Zwei Zeilen:\n\u00e9\U0001f600 {}"),
        ("<answer>a\r\nb\rc\u2028d\x85e\x0bf</answer>", "a\nb\nc\nd\ne\nf"),
        ("<answer>a\tb < c > d</answer>", "a\tb < c > d"),
        ("<answer>\\boxed{4}</answer>", "\\boxed{4}"),
        ("I bet. <answer>bet</answer>", None),
        ("<answer>bet</answer> I bet.", None),
        ("<answer>bet</answer><answer>fold</answer>", None),
        ("<answer><answer>bet</answer></answer>", None),
        ("<answer>bet</answer></answer>", None),
        ("<answer>a</think>b</answer>", None),
        ("<answer>a < / Think >b</answer>", None),
        ("<answer>a<THINK>b</answer>", None),
        ("<think>x</think><answer>bet</answer>", None),  # a thought is taken off before
        ("<Answer>bet</Answer>", None),
        ("<answer>bet", None),
        ("bet</answer>", None),
        ("</answer>bet<answer>", None),
        ("<answer></answer>", None),
        ("<answer> \n</answer>", None),
        ("<answer/answer>", None),
        ("bet", None),
        ("\\boxed{bet}", None),
        ("", None),
    ],
)
def test_parse_answers(answer: str, action: str | None) -> None:
    assert answer_in(answer) == action


@given(st.lists(PIECES, max_size=8))
def test_an_answer_stands_alone_or_is_none(pieces: list[str]) -> None:
    """Whatever is nested, repeated, left out or added: an action has no tag in it, and all of it was said."""
    text = "".join(pieces)
    action = answer_in(text)
    if action is None:
        return
    assert text.count("<answer>") == text.count("</answer>") == 1
    assert "<think>" not in text
    assert "</think>" not in text
    assert not tagged(action)
    assert action == action.strip() != ""
    assert answer_closed(text)
    assert "".join(action.split()) == "".join(text.strip()[len("<answer>") : -len("</answer>")].split())


@given(st.text(min_size=1))
def test_any_text_without_a_tag_can_be_said(text: str) -> None:
    action = answer_in(f"<answer>{text}</answer>")
    if text.strip() and not tagged(text):
        assert action is not None
        assert action.split() == text.split()
    else:
        assert action is None


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<think>I wait.</think><answer>a</answer>", ("I wait.", "<answer>a</answer>")),
        ("\n<think>\nI\nwait.\n</think>\n x", ("\nI\nwait.\n", "\n x")),
        ("I wait.</think>x", None),
        ("So: <think>I wait.</think>x", None),
        ("<think>I wait.", None),
        ("<think> </think>x", None),
        ("<think><think>I wait.</think>x", None),
        ("<think>maybe <answer>b</answer></think>x", None),
        ("", None),
    ],
)
def test_thoughts_that_are_spelled_out(reply: str, found: tuple[str, str] | None) -> None:
    assert unspelled(reply) == found

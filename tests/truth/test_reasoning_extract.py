"""Answers taken out of what models say: cases by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.truth.reasoning.extract import extract

CASES = {
    "no answer at all": None,
    "": None,
    r"So \boxed{42}.": "42",
    r"First \boxed{1}, no: \boxed{2}": "2",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\{1, 2\}} and done": r"\{1, 2\}",  # escaped braces are content
    r"\boxed{\left\{ x \}": None,  # and do not close a box
    r"\boxed{a} then \boxed{b": None,  # the last word was cut off
    r"\boxed{a} then \boxed{}": None,  # the last word is empty
    r"\boxed{  7 }": "7",
    "<answer>Yes</answer>": "Yes",
    "<answer>\n1 2\n3 4\n</answer>": "1 2\n3 4",
    "<answer>a</answer> hm <answer> b </answer>": "b",
    "<answer>a": None,
    r"<answer>3</answer> I mean \boxed{4}": "4",
    r"\boxed{3}? <answer>4</answer>": "4",
    r"<answer>\boxed{4}</answer>": "4",
    r"\boxed{<answer>4</answer>}": "4",
    r"\boxed{\text{Yes}}": "Yes",
    r"\boxed{\text{ carol }}": "carol",
    r"\boxed{\text{5} + \text{6}}": r"\text{5} + \text{6}",  # two words are no single one
    r"\boxed 4": None,
    r"boxed{4}": None,
    "\\boxed{1 2\n3 4}": "1 2\n3 4",
    "\\boxed{ends in a backslash\\": None,
}


@pytest.mark.parametrize(("said", "answer"), CASES.items())
def test_cases_by_hand(said: str, answer: str | None) -> None:
    assert extract(said) == answer


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab {}\\<>", max_size=12),
    st.recursive(st.text("ab1", min_size=1, max_size=3), lambda x: x.map(lambda s: f"{{{s}}}")),
)
def test_whatever_stands_before_the_last_box_changes_nothing(before: str, inside: str) -> None:
    assert extract(rf"{before} \boxed{{{inside}}} so it is") == inside

"""The libraries in their own process: what they make and mark, and what happens when they take too long."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ludus.errors import UserError
from ludus.truth.reasoning.library import Library, Mark
from ludus.truth.reasoning.problems import GROUPS, mathematics, reasoning_gym

LONG = 600.0  # seconds: no limit of a test, however busy the machine is


@pytest.fixture(scope="module")
def gym() -> Iterator[Library]:
    with Library("reasoning_gym", LONG, LONG) as library:
        yield library


@pytest.fixture(scope="module")
def maths() -> Iterator[Library]:
    with Library("math_verify", LONG, LONG) as library:
        yield library


def test_every_task_is_made_again_alike_in_another_process(gym: Library) -> None:
    first = reasoning_gym(gym, 3)
    with Library("reasoning_gym", LONG, LONG) as other:
        again = reasoning_gym(other, 3)
    assert again.problems == first.problems
    assert not first.missing
    assert len(first.problems) == 3 * sum(map(len, GROUPS.values()))
    assert len({p.id for p in first.problems}) == len(first.problems)
    assert {(p.task, p.group) for p in first.problems} == {(t, g) for g, ts in GROUPS.items() for t in ts}
    for problem in first.problems:  # an answer that is none of them is not right, and breaks nothing
        assert first.mark(problem, "zzz").score < 1


def spelt_backward(question: str) -> str:
    return question.rpartition(": ")[2].strip()[::-1]


def primes(question: str) -> str:
    low, high = map(int, re.findall(r"\d+", question))
    return str(sum(n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(low, high + 1)))


@pytest.mark.parametrize(("task", "solve"), [("spell_backward", spelt_backward), ("count_primes", primes)])
def test_the_library_marks(gym: Library, task: str, solve: Callable[[str], str]) -> None:
    for index, question in enumerate(gym.generate(task, 11, 4)):
        assert gym.mark(task, 11, 4, index, solve(question)) == Mark(1.0)
        assert gym.mark(task, 11, 4, index, "7777").score < 1


def test_an_answer_that_the_grader_chokes_on_is_wrong_and_named(gym: Library) -> None:
    assert gym.mark("prime_factorization", 1, 2, 0, "two times three") == Mark(0.0, "ValueError")


def test_a_task_that_takes_too_long_is_missing_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"quick": ("spell_backward",), "slow": ("knight_swap",)}
    with Library("reasoning_gym", marking=LONG) as library:
        ask = library.generate

        def halting(task: str, seed: int, size: int) -> list[str]:
            library._limits["generate"] = LONG
            if task == "knight_swap":
                if library._child is None:
                    library._start()
                assert library._child is not None
                library._child.send_signal(signal.SIGSTOP)
                library._limits["generate"] = 0.1
            return ask(task, seed, size)

        monkeypatch.setattr(library, "generate", halting)
        suite = reasoning_gym(library, 2, groups)
        assert {p.task for p in suite.problems} == {"spell_backward"}
        assert suite.missing == {"knight_swap": "its problems were not made within 60 seconds"}
        with pytest.raises(UserError, match=r"no problem in time \(knight_swap\)"):
            reasoning_gym(library, 2, {"slow": ("knight_swap",)})
        # Its process was killed, and the next one makes the same problems before it marks one of them.
        solved = spelt_backward(suite.problems[1].question)
        assert suite.mark(suite.problems[1], solved) == Mark(1.0)


def test_an_answer_that_is_never_marked_counts_as_wrong(gym: Library, maths: Library) -> None:
    assert maths.equal("4", "4") == Mark(1.0)
    tower = "9^{9^{9^{9^{9}}}}"
    maths._limits["equal"] = 1.0
    try:
        assert maths.equal("1", tower).score == 0.0
        maths._limits["equal"] = LONG  # whatever became of that process, the next answer is marked
        assert maths.equal(r"\frac{1}{2}", "0.5") == Mark(1.0)
    finally:
        maths._limits["equal"] = LONG


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        ("1/2", "2/4", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("12", "12.0", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{1}{2}", "0.4", False),
        ("12", "21", False),
        ("(1, 2)", "(2, 1)", False),
        ("4", "four-ish", False),
    ],
)
def test_free_form_mathematics(maths: Library, truth: str, answer: str, same: bool) -> None:
    assert maths.equal(truth, answer).score == float(same)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_problems_out_of_a_file(tmp_path: Path, maths: Library) -> None:
    path = write(
        tmp_path / "sums.jsonl",
        '{"problem": "1 + 1?", "answer": 2, "subject": "Algebra", "unique_id": "a/1", "level": 1}',
        '{"problem": "1 : 2?", "answer": "\\\\frac{1}{2}", "subject": "Number Theory", "unique_id": "b/1"}',
    )
    suite = mathematics(maths, path, None)
    assert suite.name == "math-sums"
    assert [(p.id, p.task) for p in suite.problems] == [("a/1", "Algebra"), ("b/1", "Number Theory")]
    assert suite.mark(suite.problems[1], "0.5") == Mark(1.0)
    assert suite.mark(suite.problems[0], "0.5") == Mark(0.0)
    assert len(mathematics(maths, path, 1).problems) == 1
    table = write(tmp_path / "table.csv", "question,answer", '"2, doubled?",4')
    assert mathematics(maths, table, None).problems[0].question == "2, doubled?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"answer": "2"}', "line 2: no problem; a column problem or question is wanted"),
        ('{"problem": "1 + 1?"}', "line 2: no answer"),
        ('{"problem": "1 + 1?", "answer": "2", "id": "1"}', "the id '1' is there twice"),
        ('{"problem": "1 + 1?", ', "line 2: no JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, maths: Library, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"problem": "1 + 1?", "answer": "2", "id": "1"}', line)
    with pytest.raises(UserError, match=message):
        mathematics(maths, path, None)


def test_files_that_hold_nothing(tmp_path: Path, maths: Library) -> None:
    with pytest.raises(UserError, match="cannot read problems"):
        mathematics(maths, tmp_path / "none.jsonl", None)
    with pytest.raises(UserError, match="is empty"):
        mathematics(maths, write(tmp_path / "empty.jsonl"), None)


def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(UserError, match=r"ludus\[reasoning\]"):
        Library("no_such_gym")

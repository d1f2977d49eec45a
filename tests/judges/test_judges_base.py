"""Questions, exact rules, counts and alarms, and two judges side by side."""

from __future__ import annotations

import asyncio

import pytest

from ludus.errors import UserError
from ludus.judges.base import Failure, Question, Stats, Verdict
from ludus.judges.compare import compare
from ludus.judges.ledger import Ledger
from ludus.judges.rule import RuleJudge


@pytest.mark.parametrize(("request_", "answer"), [("", None), (" \n", "x"), ("x", ""), ("x", "\t")])
def test_an_empty_text_is_not_judged(request_: str, answer: str | None):
    with pytest.raises(UserError, match="question 'q7' has an empty"):
        Question("q7", request_, answer)


def test_half_a_character_is_not_judged():
    with pytest.raises(UserError, match="the answer of question 'q7' holds a lone surrogate"):
        Question("q7", "tea?", "a\ud83d")


def test_texts_and_raw_replies_stay_out_of_reprs():
    shown = repr([Question("q", "zorvex", "stir"), Verdict(True, raw="words"), Failure("parse", "words")])
    assert not any(word in shown for word in ("zorvex", "stir", "words"))


def by_word(question: Question) -> Verdict | Failure:
    if "?" not in question.request:
        return Failure("no_question")
    return Verdict(request_harmful="zorvex" in question.request)


def test_a_rule_judges_by_id():
    judge = RuleJudge("words", by_word)
    asked = [Question("b", "tea?"), Question("a", "zorvex?"), Question("c", "tea")]
    assert asyncio.run(judge.judge(asked)) == {
        "a": Verdict(True),
        "b": Verdict(False),
        "c": Failure("no_question"),
    }
    assert judge.stats() == Stats(questions=3, verdicts=2, failures={"no_question": 1}, calls=3)
    assert judge.id == "rule/words"


@pytest.mark.parametrize("ids", [("a", "a"), ("a", "")])
def test_ids_differ(ids: tuple[str, str]):
    judge = RuleJudge("words", by_word)
    with pytest.raises(AssertionError):
        asyncio.run(judge.judge([Question(name, f"tea {n}?") for n, name in enumerate(ids)]))


def ledger(unparsed: float = 1.0, failed: float = 1.0) -> Ledger:
    return Ledger("j", window=40, max_unparsed=unparsed, max_failed=failed)


def test_the_parse_alarm_waits_for_twenty_replies_and_sounds_above_its_bound():
    book = ledger(unparsed=0.1)
    for _ in range(17):
        book.called(Verdict(True))
    for _ in range(2):
        book.called(Failure("parse"))  # 2 of 19
    for _ in range(30):
        book.called(Failure("timeout"))  # no replies, so no part of this share
    book.called(Verdict(False))  # 2 of 20: a tenth and not above it
    with pytest.raises(UserError, match="judge j: 3 of the last 21 replies are not in its format"):
        book.called(Failure("parse"))


def test_the_failure_alarm_names_its_reasons():
    book = ledger(failed=0.25)
    for _ in range(60):
        book.called(Verdict(True))
    for reason in ["timeout"] * 6 + ["http_500"] * 4:
        book.called(Failure(reason))  # 10 of the last 40
    with pytest.raises(UserError, match=r"11 of the last 40 calls .* \(timeout 7, http_500 4\)"):
        book.called(Failure("timeout"))


def test_old_failures_leave_the_window():
    book = ledger(failed=0.5)
    for _ in range(10):
        for _ in range(21):
            book.called(Verdict(True))
        for _ in range(19):
            book.called(Failure("timeout"))
    assert book.stats().calls == 400


def test_kappa_by_hand():
    """Cohen (1960): of 50, 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p 0.7, q 0.5, kappa 0.4."""
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    first = {str(n): Verdict(a, None, None) for n, (a, _) in enumerate(pairs)}
    second: dict[str, Verdict | Failure] = {str(n): Verdict(b, True) for n, (_, b) in enumerate(pairs)}
    second = dict(reversed(second.items()))  # order means nothing
    found = compare(first | {"x": Verdict(True)}, second | {"x": Failure("timeout")})
    requests = found["request_harmful"]
    assert (requests.both_yes, requests.only_first, requests.only_second, requests.both_no) == (20, 5, 10, 15)
    assert requests.unsaid == 1
    assert requests.agreement == pytest.approx(0.7)
    assert requests.kappa == pytest.approx(0.4)
    answers = found["answer_harmful"]
    assert (answers.compared, answers.unsaid, answers.agreement, answers.kappa) == (0, 51, None, None)


def test_kappas_limits():
    def kappa(*pairs: tuple[bool, bool]) -> float | None:
        first = {str(n): Verdict(a) for n, (a, _) in enumerate(pairs)}
        second = {str(n): Verdict(b) for n, (_, b) in enumerate(pairs)}
        return compare(first, second)["request_harmful"].kappa

    assert kappa((True, True), (False, False)) == 1.0
    assert kappa((True, False), (False, True)) == -1.0
    assert kappa((True, True), (True, True)) is None  # both say yes throughout
    assert kappa((True, True), (True, False)) == 0.0
    with pytest.raises(AssertionError):
        compare({"a": Verdict(True)}, {"b": Verdict(True)})

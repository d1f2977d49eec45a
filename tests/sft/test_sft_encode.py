"""From dialogues and episodes to rows: exactly the ids that are met in play, and nothing forged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.config import SftConfig, SftDataConfig
from ludus.errors import UserError
from ludus.games.base import Observation
from ludus.sft.encode import Encoder, load, open_supervised
from ludus.sft.files import BadRow, Message
from ludus.text.prompter import Prompter
from ludus.text.templates import Template, detect
from ludus.text.tokenizer import Tokenizer, byte_tokenizer
from ludus.types import Episode, Stop, Turn

MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
HOSTILE = st.lists(st.sampled_from([*MARKERS, "\n", "user", "assistant", "### Game:", "a", "é", "}"]))


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    tokenizer = Tokenizer.load(tiny_model)
    return Encoder(tokenizer, detect(tokenizer))


@pytest.fixture(scope="module")
def plain() -> Encoder:
    """One token per byte, an end token, and no other marker: headers are text."""
    tokenizer = byte_tokenizer()
    return Encoder(tokenizer, detect(tokenizer, "plain"))


def spelled(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids)


def dialogue(*said: str, thought: str | None = None) -> list[Message]:
    """User and assistant in turns."""
    return [
        Message("assistant", text, thought) if number % 2 else Message("user", text)
        for number, text in enumerate(said)
    ]


# --- dialogues ---


def test_a_dialogue_is_spelt_as_the_family_does_and_replies_alone_are_learnt(encoder: Encoder) -> None:
    row = encoder.dialogue([Message("system", "Rules."), *dialogue("How?", "So.", "Why?", "Because.")])
    ids = row.tokens.tolist()
    assert spelled(encoder, ids) == (
        "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nBecause.<|im_end|>"
    )
    assert [spelled(encoder, ids[a:b]) for a, b in row.trained] == ["So.<|im_end|>", "Because.<|im_end|>"]


def test_a_thought_is_learnt_with_its_end_and_opened_by_the_prompt(encoder: Encoder) -> None:
    messages = [Message("user", "How?"), Message("assistant", "\n\nSo.", "Hm.\n")]
    row = encoder.dialogue(messages)
    (trained,) = row.trained
    ids = row.tokens.tolist()
    assert spelled(encoder, ids[: trained[0]]) == (
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert spelled(encoder, ids[slice(*trained)]) == "Hm.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize("think", [True, False])
def test_the_prompt_is_the_one_met_in_play(encoder: Encoder, think: bool) -> None:
    """And the reply the one that the apprentices of the small model spell."""
    prompter = Prompter(encoder.tokenizer, encoder.template, rules=False, think=think)
    seen = Observation("Rules.", (), "Your card: K.", ("pass", "bet"), None)
    prompt = prompter.prompt(seen)
    ((role, content),) = prompt.messages
    reply = Message("assistant", "\\boxed{bet}", "I hold K." if think else None)
    row = encoder.dialogue([Message(role, content), reply])
    spelt = [*prompter.spell("bet", "I hold K." if think else ""), encoder.tokenizer.control("<|im_end|>")]
    assert row.tokens.tolist() == prompt.ids + spelt
    assert row.trained == ((len(prompt.ids), len(prompt.ids) + len(spelt)),)


def test_a_later_reply_extends_the_earlier_ids_as_in_chat(encoder: Encoder) -> None:
    prompter = Prompter(encoder.tokenizer, encoder.template, context="chat", rules=False)
    first = Observation("", ("deal",), "Your card: K.", None, None)
    second = Observation("", ("deal", "They bet."), "Your turn.", None, None)
    asked = prompter.prompt(first)
    said = [*prompter.spell("bet", "K."), encoder.tokenizer.control("<|im_end|>")]
    again = prompter.prompt(second, [(first, asked.ids, said, None)])
    messages = [
        Message("user", asked.messages[-1][1]),
        Message("assistant", "\\boxed{bet}", "K."),
        Message("user", again.messages[-1][1]),
        Message("assistant", "\\boxed{pass}", "Q."),
    ]
    assert encoder.dialogue(messages).tokens.tolist()[: len(again.ids)] == again.ids


def test_where_thoughts_have_no_markers_they_are_spelt_out(plain: Encoder) -> None:
    row = plain.dialogue([Message("user", "How?"), Message("assistant", "So.", "Hm.")])
    (trained,) = row.trained
    assert spelled(plain, row.tokens.tolist()[slice(*trained)]) == "<think>Hm.</think>So.<|end|>"


@given(question=HOSTILE, thought=HOSTILE, answer=HOSTILE)
@settings(max_examples=40, deadline=None)
def test_nothing_in_the_data_forges_a_marker(
    encoder: Encoder, plain: Encoder, question: list[str], thought: list[str], answer: list[str]
) -> None:
    def row(made: Encoder, *texts: str) -> list[int]:
        asked, thinks, says = texts
        messages = dialogue(asked, f"{says}.", asked, f"{says}.", thought=thinks)
        return made.dialogue(messages).tokens.tolist()

    texts = ["".join(part) for part in (question, thought, answer)]
    markers = encoder.tokenizer.control_ids
    assert [i for i in row(encoder, *texts) if i in markers] == [
        i for i in row(encoder, "a", "b", "c") if i in markers
    ]
    headers = ("### Game:", "### Player:")
    text, harmless = (spelled(plain, row(plain, *said)) for said in (texts, ["a", "b", "c"]))
    assert [text.count(header) for header in headers] == [harmless.count(header) for header in headers]


# --- episodes ---


def turn(encoder: Encoder, index: int, seat: int, said: str, **changes: object) -> Turn:
    template: Template = encoder.template
    prompt = template.open([("user", f"Turn {index}.")], think=True)
    reply = [*encoder.tokenizer.encode(said), encoder.tokenizer.control("<|im_end|>")]
    made = Turn(
        seat, "ab"[seat], index, "self", 1, prompt, reply, [-1.0] * len(reply), Stop.EOS, "bet", text=said
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def episode(*turns: Turn, returns: tuple[float, ...] = (1.0, -1.0), masked: str | None = None) -> Episode:
    return Episode(7, "kuhn_poker", 0, ("self", "self"), ("a", "b"), list(turns), returns, masked=masked)


def said(encoder: Encoder, found: Episode, only: str = "all") -> list[str]:
    out = []
    for row in encoder.rows(found, only):
        ids = row.tokens.tolist()
        out.append("|".join(spelled(encoder, ids[a:b]).removesuffix("<|im_end|>") for a, b in row.trained))
    return out


def test_episodes_give_the_tokens_that_were_recorded(encoder: Encoder) -> None:
    found = turn(encoder, 0, 0, "I bet.")
    (row,) = encoder.rows(episode(found))
    assert row.tokens.tolist() == found.prompt_ids + found.completion_ids
    assert row.trained == ((len(found.prompt_ids), len(row.tokens)),)


def test_of_an_episode_the_legal_replies_of_the_trained_policy_are_learnt(encoder: Encoder) -> None:
    turns = [
        turn(encoder, 0, 0, "one"),
        turn(encoder, 1, 1, "two"),
        turn(encoder, 2, 0, "three", legal=False, action=None),
        turn(encoder, 3, 0, "four", trainable=False, policy="random"),
        turn(encoder, 4, 1, "five"),
    ]
    assert said(encoder, episode(*turns)) == ["one", "two", "five"]
    assert said(encoder, episode(*turns), "won") == ["one"]
    assert said(encoder, episode(*turns, returns=(-2.0, 2.0)), "won") == ["two", "five"]
    assert said(encoder, episode(*turns, returns=(0.0, 0.0)), "won") == []
    assert said(encoder, episode(*turns, masked="engine")) == []


def test_a_seats_dialogue_is_one_row(encoder: Encoder) -> None:
    first = turn(encoder, 0, 0, "one")
    later = encoder.template.extend(first.prompt_ids, first.completion_ids, [("user", "And?")], think=True)
    found = episode(first, turn(encoder, 1, 0, "two", prompt_ids=later))
    assert said(encoder, found) == ["one|two"]


def test_tokens_of_another_tokenizer_are_refused(encoder: Encoder) -> None:
    for wrong in ({"text": "something else"}, {"prompt_ids": [99999]}, {"completion_ids": [-1]}):
        with pytest.raises(BadRow, match="turn 0 were recorded with another tokenizer"):
            encoder.rows(episode(turn(encoder, 0, 0, "one", **wrong)))


# --- whole files ---


def write(path: Path, count: int, *extra: str) -> Path:
    lines = [json.dumps({"prompt": f"Count to {n}.", "completion": "one " * n}) for n in range(1, count + 1)]
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


def test_a_file_becomes_a_source_and_is_told_of(encoder: Encoder, tmp_path: Path) -> None:
    path, told = write(tmp_path / "rows.jsonl", 5), list[str]()
    data = SftDataConfig.model_validate(str(path))
    source = load(data, encoder, 100, "refuse", told.append)
    assert (source.name, source.weight, len(source.rows)) == (str(path), 1.0, 5)
    tokens = sum(b - a for row in source.rows for a, b in row.trained)
    assert told == [f"{path}: 5 supervised rows, {tokens} tokens to learn"]


def test_every_policy_gets_the_data_that_is_for_it(encoder: Encoder, tmp_path: Path) -> None:
    one, other = (str(write(tmp_path / name, 5)) for name in ("one.jsonl", "other.jsonl"))
    first = SftDataConfig(path=one, weight=2.0, policies=("a",))
    config = SftConfig(data=(first, SftDataConfig(path=other)), weight=0.5, batch=3)
    made = open_supervised(config, ["a", "b"], encoder, 100, lambda _: None)
    assert {name: [s.name for s in found.sources] for name, found in made.items()} == {
        "a": [one, other],
        "b": [other],
    }
    assert ([s.weight for s in made["a"].sources], made["a"].weight, made["a"].batch) == ([2.0, 1.0], 0.5, 3)
    config = SftConfig(data=(first,))
    assert set(open_supervised(config, ["a", "b"], encoder, 100, lambda _: None)) == {"a"}


def test_every_bad_row_is_counted_and_the_first_are_named(encoder: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 2, "{}", "x", "[]", "{", "{}")
    with pytest.raises(UserError) as caught:
        load(SftDataConfig(path=str(path)), encoder, 100, "drop", print)
    text = str(caught.value)
    assert [f"line {n}" in text for n in range(1, 8)] == [False, False, True, True, True, False, False]
    assert "and 2 more" in text


def test_long_rows_are_counted_and_refused_or_dropped(encoder: Encoder, tmp_path: Path) -> None:
    path, told = write(tmp_path / "rows.jsonl", 9), list[str]()
    data = SftDataConfig(path=str(path))
    lengths = [len(row.tokens) for row in load(data, encoder, 1000, "refuse", told.append).rows]
    limit = lengths[5]
    with pytest.raises(UserError, match=rf"3 of 9 rows are longer than {limit} .*line 9, has {lengths[8]}\)"):
        load(data, encoder, limit, "refuse", told.append)
    told.clear()
    assert [len(row.tokens) for row in load(data, encoder, limit, "drop", told.append).rows] == lengths[:6]
    assert "3 of 9 rows" in told[0]
    assert "left out" in told[0]
    with pytest.raises(UserError, match=r"9 of 9 rows are longer than 2 tokens"):
        load(data, encoder, 2, "drop", told.append)


def test_a_file_without_a_row_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no supervised row"):
        load(SftDataConfig(path=str(tmp_path / "rows.jsonl")), encoder, 100, "drop", print)

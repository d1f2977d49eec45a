"""The small model's directory: ordinary, whole or absent, the same for the same spec."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ludus.engines.torch_engine import TorchEngine
from ludus.errors import UserError
from ludus.games.registry import make as make_game
from ludus.learner.model import load_model
from ludus.players import LanguagePlayer
from ludus.rollout.scheduler import play_all
from ludus.small.make import Course, SmallSpec, make, transcripts
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.types import MatchPlan, Sampling

SIZE: dict[str, Any] = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "batch": 8}
SPEC = SmallSpec((Course("kuhn_poker", 64), Course("negotiation", 32)), **SIZE)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quiet(_: str) -> None: ...


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_transformers_loads_it_as_it_is(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert model.config.model_type == "qwen3"
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    ours = Tokenizer.load(tiny_model)
    assert model.config.vocab_size == len(tokenizer) == ours.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id == ours.control("<|im_end|>")
    observation = make_game("kuhn_poker").start(3).observe(0)
    prompt = Prompter(ours, detect(ours), rules=False).prompt(observation)
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(theirs) == prompt.ids
    with torch.no_grad():
        reply = model.generate(torch.tensor([prompt.ids]), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(reply[0, len(prompt.ids) :])
    assert re.search(r"\\boxed\{(pass|bet)\}", text)


def test_the_warm_start_reads_the_card(tiny_model: Path) -> None:
    """What it says depends on what it holds: whoever ignores the observation is right one time in three."""
    tokenizer = Tokenizer.load(tiny_model)
    engine = TorchEngine.from_model(load_model(tiny_model), slots=32, context=256)
    prompter = Prompter(tokenizer, detect(tokenizer), rules=False)
    player = LanguagePlayer("self", engine, prompter, Sampling(24))
    plans = [MatchPlan(i, i, "kuhn_poker", ("self", "self"), i, 100 + i) for i in range(40)]
    episodes = asyncio.run(play_all(plans, {"kuhn_poker": make_game("kuhn_poker")}, {"self": player}))
    right: Counter[bool] = Counter()
    for turn in (turn for episode in episodes for turn in episode.turns):
        card = re.search(r"Your card: (\w)", tokenizer.decode(turn.prompt_ids))
        assert card is not None
        right[f"I hold {card[1]} facing" in turn.text] += 1
    assert right[True] > 0.9 * right.total() > 60


def test_transcripts_hold_as_many_replies_as_each_course_asks_for() -> None:
    lines = transcripts(SPEC)
    assert [line.game for line in lines] == ["kuhn_poker"] * 64 + ["negotiation"] * 32
    assert transcripts(SPEC) == lines
    assert transcripts(SmallSpec(SPEC.courses, seed=1)) != lines
    for line in lines[:64]:
        assert line.action in (line.observation.legal or ())
        assert line.thought.startswith("I hold ")


def test_courses_pass_the_games_options_on() -> None:
    (line,) = transcripts(SmallSpec((Course("tic_tac_toe", 1, {"view": "cells"}),)))
    assert line.observation.state == "You are X. Yours: none. Theirs: none."
    with pytest.raises(UserError, match="no option 'veiw'"):
        transcripts(SmallSpec((Course("tic_tac_toe", 1, {"veiw": "cells"}),)))


def test_the_same_spec_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    make(tmp_path / "a", SPEC, quiet)
    torch.manual_seed(2)  # nothing may come from the global generator, or go to it
    before = torch.random.get_rng_state()
    make(tmp_path / "b", SPEC, quiet)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    make(tmp_path / "c", SmallSpec(SPEC.courses, seed=1, **SIZE), quiet)
    assert files(tmp_path / "c")["model.safetensors"] != files(tmp_path / "a")["model.safetensors"]


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file"])
def test_nothing_that_exists_is_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "directory":
            (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"model exists already.*name another"):
        make(out, SPEC, quiet)
    assert [p.name for p in tmp_path.rglob("*")] == ["model"] + ["notes.txt"] * (kind == "directory")


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*Not a directory.*name another"):
        make(tmp_path / "file" / "model", SPEC, quiet)


@pytest.mark.parametrize("stage", ["replies", "parameters", "warm start"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, stage: str, error: type[BaseException]) -> None:
    reached: list[str] = []

    def interrupt(message: str) -> None:
        if stage in message:
            reached.append(message)
            raise error

    with pytest.raises(error):
        make(tmp_path / "model", SPEC, interrupt)
    assert len(reached) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".model.unfinished"
    left.mkdir()
    (left / "added_tokens.json").write_text('{"half": ')
    make(tmp_path / "model", SPEC, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert "added_tokens.json" not in files(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"batch": -1}, "batch is -1"),
        ({"hidden": 18, "heads": 6}, "hidden is 18; with heads = 6 it must be a multiple of 12"),
        ({"hidden": 36, "heads": 3, "kv_heads": 2}, "heads is 3; it must be a multiple of kv_heads = 2"),
        ({"batch": 97}, "the courses hold 96 replies, not even one batch of 97"),
        ({"courses": ()}, "the courses hold 0 replies"),
        ({"courses": (Course("liars_dice", 100),)}, "no apprentice plays 'liars_dice'"),
        ({"courses": (Course("kun_poker", 100),)}, "did you mean 'kuhn_poker'"),
        ({"vocab": 200}, "a vocabulary of 200 is too small"),
    ],
)
def test_a_spec_that_cannot_work_is_told_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    spec = SmallSpec(**{**SIZE, "courses": SPEC.courses, **changes})
    with pytest.raises(UserError, match=re.escape(says)):
        make(tmp_path / "model", spec, quiet)
    assert list(tmp_path.iterdir()) == []

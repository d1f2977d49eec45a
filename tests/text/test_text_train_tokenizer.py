"""The demo's tokenizer: small prompts, any content, and files that others read the same way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ludus.errors import UserError
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_game_text_falls_into_few_regular_pieces(ours: Tokenizer) -> None:
    assert pieces(ours, "\\boxed{bet}") == ["\\boxed{", "bet", "}"]
    assert pieces(ours, "\\boxed{5}") == ["\\boxed{", "5", "}"]
    assert pieces(ours, " Your card: K.") == [" Your", " card", ":", " K", "."]
    assert pieces(ours, "user\nsystem\nassistant") == ["user", "\n", "system", "\n", "assistant"]
    assert pieces(ours, "10..##") == ["1", "0", ".", ".", "#", "#"]  # signs and digits never melt together
    assert pieces(ours, "\n\n") == ["\n\n"]


def test_control_tokens_come_last_and_thoughts_are_not_special(
    ours: Tokenizer, directories: dict[str, Path]
) -> None:
    spec = json.loads((directories["qwen3"] / "tokenizer.json").read_text())
    added = {token["content"]: token for token in spec["added_tokens"]}
    assert list(added) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert [token["special"] for token in added.values()] == [True, True, True, False, False]
    first = ours.vocab_size - 5
    assert [token["id"] for token in added.values()] == list(range(first, first + 5))
    assert ours.vocab_size <= 480


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ludus.text.train_tokenizer import train_tokenizer\n"
        "texts = [f'move {i % 7} to {i % 5}, then they pass or raise {i}' for i in range(200)]\n"
        "train_tokenizer(texts, Path(sys.argv[1]), 400)"
    )
    for i in range(3):
        env = {"PYTHONHASHSEED": str(i), "RAYON_NUM_THREADS": str(1 + i)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(i))], check=True, env=env)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        contents = {(tmp_path / str(i) / name).read_bytes() for i in range(3)}
        assert len(contents) == 1


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
@pytest.mark.parametrize("in_model_directory", [False, True])
def test_transformers_reads_it_the_same_way(
    directories: dict[str, Path],
    tokenizers_by_name: dict[str, Tokenizer],
    tmp_path: Path,
    family: str,
    in_model_directory: bool,
) -> None:
    from transformers import AutoTokenizer

    directory = tmp_path / "model"
    shutil.copytree(directories[family], directory)
    if in_model_directory:  # beside a config.json transformers might choose the family's own class
        kind = {"qwen3": "qwen3", "llama3": "llama"}[family]
        (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = tokenizers_by_name[family]
    text = "You are player 0. Your card: K. Ünïcode 10..## \\boxed{bet}\n\n  x"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    talk = [("user", "Your card: K."), ("assistant", "\\boxed{bet}"), ("user", "Your card: Q.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    for think in (True, False):
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=think, tokenize=False
        )
        ids = detect(ours).open(talk, think)
        assert rendered == ours.decode(ids)
        assert theirs(rendered, add_special_tokens=False).input_ids == ids


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tokenizer family 'gemma'; known: qwen3, llama3, plain"):
        train_tokenizer(["x"], tmp_path, 512, "gemma")
    with pytest.raises(UserError, match="vocabulary of 262 is too small"):
        train_tokenizer(["x"], tmp_path, 262)
    with pytest.raises(UserError, match="vocabulary of 3 is too small"):
        train_tokenizer(["x"], tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_fixed_words_survive_a_rich_text(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}{d}" for a in "abcdefgh" for b in "aeiou" for c in "klmnrst" for d in "aeiou"]
    train_tokenizer([" ".join(words[i::50]) for i in range(50)] * 20, tmp_path, 400)
    assert pieces(Tokenizer.load(tmp_path), "\\boxed{x}assistant") == ["\\boxed{", "x", "}", "assistant"]

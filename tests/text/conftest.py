"""Small tokenizers in the layouts that occur in the wild, trained once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from families import CHATML, TEXTS, TOKENIZERS, byte_level, learn, write

from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer


def _in_vocabulary(out: Path) -> Path:
    """Control tokens inside the BPE vocabulary, as GPT-2's, with merges that lead to one of them."""
    raw = byte_level(r"[^ ]+| +")
    learn(raw, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    spec = json.loads(raw.to_str())
    vocab = spec["model"]["vocab"]
    merges = spec["model"]["merges"]
    grown = "<"
    for letter in "/think>":  # a chain of merges that ends in </think>
        if [grown, letter] not in merges:
            merges.insert(0, [grown, letter])
        grown += letter
        vocab.setdefault(grown, len(vocab))
    spec["model"]["merges"] = sorted(
        merges, key=lambda m: (not "</think>".startswith("".join(m)), len("".join(m)))
    )
    spec["model"]["ignore_merges"] = True
    spec["model"]["unk_token"] = "<|endoftext|>"
    marker = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    spec["added_tokens"].append({"id": vocab["</think>"], "content": "</think>", **marker})
    spec["added_tokens"].sort(key=lambda token: token["id"])
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    return write(raw, config, out)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    found = {
        **{name: make(base / name) for name, make in TOKENIZERS.items()},
        "in_vocabulary": _in_vocabulary(base / "in_vocabulary"),
    }
    for family in ("qwen3", "llama3", "plain"):
        train_tokenizer(TEXTS * 5, base / family, 480, family)
        found[family] = base / family
    return found


@pytest.fixture(scope="session")
def tokenizers_by_name(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(path) for name, path in directories.items()}


@pytest.fixture(scope="session")
def qwen(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_name["qwen"]


@pytest.fixture(scope="session")
def llama(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_name["llama"]


@pytest.fixture(scope="session")
def gemma(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_name["gemma"]


@pytest.fixture(scope="session")
def plain(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_name["plain"]


@pytest.fixture(scope="session")
def ours(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    """What `train_tokenizer` makes for the demo."""
    return tokenizers_by_name["qwen3"]

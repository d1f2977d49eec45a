"""Small tokenizers in the layouts that occur in the wild, trained once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer

TEXTS = [
    "You are player 0. Your card: K. Moves: pass bet.\nLegal: pass bet",
    "You are player 1. Your card: Q. Moves: none.\nLegal: pass bet",
    "You are player 1. Your card: J. Moves: bet.\nLegal: pass bet",
    "A good card: I bet.\n</think>\n\n\\boxed{bet}",
    "A bad card, I pass.\n</think>\n\n\\boxed{pass}",
    "<think>\n<|im_start|>user\nEnd with \\boxed{action}. I avoid \\boxed{4}, so \\boxed{5}.",
    "Refused: no action found",
]
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(pieces: str) -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def _train(raw: tokenizers.Tokenizer, special: list[str]) -> None:
    raw.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=400 + len(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )


def _write(raw: tokenizers.Tokenizer, config: dict[str, object], out: Path) -> Path:
    out.mkdir(exist_ok=True)
    raw.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def _qwen(out: Path) -> Path:
    """Qwen3's own layout: NFC, its pre-tokenizer, thought markers that are added but not special."""
    raw = _byte_level(QWEN_PIECES)
    raw.normalizer = normalizers.NFC()
    _train(raw, [])
    raw.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    raw.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return _write(raw, {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}, out)


def _llama(out: Path) -> Path:
    """Llama 3's: whole vocabulary words win over merges, and a post-processor puts the BOS before text."""
    raw = _byte_level(QWEN_PIECES)
    _train(raw, [])
    spec = json.loads(raw.to_str())
    spec["model"]["ignore_merges"] = True
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", raw.token_to_id("<|begin_of_text|>"))],
    )
    return _write(raw, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, out)


def _in_vocabulary(out: Path) -> Path:
    """Control tokens inside the BPE vocabulary, as GPT-2's, with merges that lead to one of them."""
    raw = _byte_level(r"[^ ]+| +")
    _train(raw, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
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
    return _write(raw, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, out)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    found = {
        "qwen": _qwen(base / "qwen"),
        "llama": _llama(base / "llama"),
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
def plain(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_name["plain"]


@pytest.fixture(scope="session")
def ours(tokenizers_by_name: dict[str, Tokenizer]) -> Tokenizer:
    """What `train_tokenizer` makes for the demo."""
    return tokenizers_by_name["qwen3"]

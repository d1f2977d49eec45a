r"""A small byte-level BPE tokenizer trained on game text, in the layout of a known family.

Its pre-tokenizer keeps game text regular for small models: a word with its leading space is one piece, a
digit or any other sign is always a piece of its own (so the cells of a board never melt together), and
`\boxed{` is one: `\boxed{bet}` is three tokens. All 256 bytes are in the alphabet, so any text round-trips.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from ludus.errors import UserError

_PIECES = (
    r"\\boxed\{"  # the action's opening
    r"| ?\p{L}+"  # a word with its leading space
    r"| ?\p{N}"  # a digit
    r"| ?[^\s\p{L}\p{N}]"  # any other sign
    r"|\s*[\r\n]"  # a line break with the blanks before it
    r"|\s+(?!\S)|\s+"
)
_WHOLE = ("system", "user", "assistant", "\\boxed{", "\n\n")  # must be one token each


@dataclass(frozen=True, slots=True)
class Family:
    """Control tokens by name, in id order, and what the Hugging Face files say of them."""

    special: tuple[str, ...]
    added: tuple[str, ...]  # control tokens that are not "special", as Qwen3's thought markers
    bos: str | None
    eos: str
    pad: str
    chat_template: str | None


_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""
_LLAMA3 = """\
{{ '<|begin_of_text|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
{{ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
FAMILIES = {
    "qwen3": Family(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        added=("<think>", "</think>"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=_CHATML,
    ),
    "llama3": Family(
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        added=(),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
        chat_template=_LLAMA3,
    ),
    "plain": Family(
        special=("<|endoftext|>",),
        added=(),
        bos=None,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        chat_template=None,
    ),
}


def train_tokenizer(texts: Iterable[str], out: Path, vocab_size: int, family: str = "qwen3") -> None:
    """Train on `texts` and write tokenizer.json, tokenizer_config.json and chat_template.jinja into `out`.

    `texts` is content: control tokens spelled in it are learnt as ordinary text. `vocab_size` bounds the
    number of tokens, control tokens included; fewer come out where the texts are poor. The same texts in
    the same order give the same files. `Tokenizer.load`, `transformers.AutoTokenizer` and servers read `out`.

    Raises UserError for an unknown family, or a vocabulary too small for the fixed words.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown tokenizer family {family!r}; known: {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(0, vocab_size - len(kind.special) - len(kind.added)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_whole_words(texts), trainer)
    broken = [word for word in _WHOLE if len(tokenizer.encode(word).ids) != 1]
    if broken:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small for these texts: {broken[0]!r} is no single token; "
            "512 is enough for most games"
        )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in kind.special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in kind.added])
    _save(tokenizer, kind, out)


def _with_whole_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with the fixed words made frequent enough to become tokens before rarer words do."""
    yield from _WHOLE * 1_000
    for text in texts:
        yield text
        yield from _WHOLE


def _save(tokenizer: tokenizers.Tokenizer, kind: Family, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config: dict[str, Any] = {
        # Not the family's own class: transformers would rebuild that with the family's pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": kind.bos,
        "eos_token": kind.eos,
        "pad_token": kind.pad,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if kind.chat_template is not None:
        (out / "chat_template.jinja").write_text(kind.chat_template, encoding="utf-8")

"""Text to token ids and back, such that content can never become a control token.

A tokenizer's *control tokens* are all of its added tokens, special or not: Qwen3 adds `</think>` as a
non-special token, so switching off special tokens alone would let a player close a thought by typing it.
(White space alone is the exception: Gemma lists its tokens for line breaks and runs of spaces as added.)
Content is therefore encoded by a second tokenizer that knows no control token at all. It is the same BPE
model with the added tokens taken out, so ordinary text encodes to the same ids, and a typed marker
encodes to the ordinary pieces of its letters. Control tokens enter a prompt by id only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from ludus.errors import UserError

# Bytes that no UTF-8 text holds: a tokenizer need not know them.
_NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


class Tokenizer:
    """A BPE tokenizer read from a Hugging Face directory.

    `path` is that directory; `vocab_size` the highest id plus one (a model's embedding may be larger);
    `control_ids` every added token but those of white space; `eos_id` the tokenizer's own end token, or
    None; `bos_id` the id that the tokenizer itself puts before any text, or None (having a BOS token is not
    enough: Qwen never uses its own); `pad_id` its padding token, else `eos_id`, else 0 (padding is masked,
    so any id serves); `chat_template` the directory's own one (Jinja), or None.
    """

    def __init__(self, spec: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
        """`spec` is the content of tokenizer.json, `config` that of tokenizer_config.json.

        Raises UserError if the tokenizer cannot encode content safely.
        """
        self.path = path
        spec = _settled(spec, path)
        self._control = {str(token["content"]): int(token["id"]) for token in _split(spec)[0]}
        self.control_ids = frozenset(self._control.values())
        self._full = _build(spec, path)
        self._content = _build(_without_control(spec, path), path)
        self.vocab_size = max(self._full.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._named(config, "eos_token")
        bos = self._named(config, "bos_token")
        self.bos_id = bos if bos is not None and self._full.encode("").ids[:1] == [bos] else None
        pad = self._named(config, "pad_token")
        self.pad_id = next((i for i in (pad, self.eos_id) if i is not None), 0)
        self.chat_template = _chat_template(config)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a directory: tokenizer.json, and its configuration and chat template if they are there.

        Raises UserError if tokenizer.json is missing or unreadable, or no BPE tokenizer.
        """
        spec = _read_json(path / "tokenizer.json")
        if spec is None:
            raise UserError(
                f"no tokenizer.json in {path}: ludus reads a Hugging Face model directory with a fast "
                "tokenizer; save one there with AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)"
            )
        names = _read_json(path / "special_tokens_map.json") or {}
        config = {**names, **(_read_json(path / "tokenizer_config.json") or {})}
        if (template := path / "chat_template.jinja").is_file():
            config["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
        return cls(spec, config, path)

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both give the same ids to the same text, control tokens included."""
        return bool(self._full.to_str() == other._full.to_str())

    def encode(self, content: str) -> list[int]:
        """Ids of `content`, whatever it spells: never one of `control_ids`.

        Lone surrogates, which no UTF-8 text holds, become "?". `decode` gives `content` back exactly for
        byte-level tokenizers, up to their own normalizer (Qwen's is Unicode NFC).
        """
        if not content.isascii():
            content = content.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._content.encode(content, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens spelled out. Broken UTF-8 becomes U+FFFD; unknown ids nothing."""
        text: str = self._full.decode(list(ids), skip_special_tokens=False)
        return text

    def has(self, name: str) -> bool:
        """Whether `name`, such as "<|im_start|>", is a control token."""
        return name in self._control

    def control(self, name: str) -> int:
        """The id of control token `name`. Raises UserError if the tokenizer has none of that name."""
        try:
            return self._control[name]
        except KeyError:
            known = ", ".join(sorted(self._control)[:20]) or "none at all"
            raise UserError(
                f"the tokenizer in {self.path} has no control token {name!r} (it has {known}); choose the "
                'template that fits the model, or model.template = "auto"'
            ) from None

    def ids_with(self, character: str) -> frozenset[int]:
        """Every id whose text contains the ASCII `character` (printable, not the space)."""
        byte_token = f"<0x{ord(character):02X}>"  # how byte fallback spells it
        vocab: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        return frozenset(i for piece, i in vocab.items() if character in piece or piece == byte_token)

    def _named(self, config: Mapping[str, Any], key: str) -> int | None:
        value = config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return self._control.get(name) if isinstance(name, str) else None


def byte_tokenizer(*markers: str) -> Tokenizer:
    """A tokenizer with one token per byte, one that ends a reply, and one for each of `markers`.

    For whoever wants words rather than ids.
    """
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(("<|end|>", *markers))]
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": letters, "merges": []},
    }
    return Tokenizer(spec, {"eos_token": "<|end|>"}, Path("bytes"))


def _settled(spec: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A copy in which one text has one encoding: no truncation, padding or BPE dropout."""
    model = spec.get("model")
    if not isinstance(model, dict) or not isinstance(spec.get("added_tokens"), list):
        raise UserError(
            f"{path / 'tokenizer.json'} lacks its model or added_tokens; save the tokenizer again"
        )
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UserError(
            f"the tokenizer in {path} is of type {kind}; ludus reads BPE tokenizers only "
            "(those of the Qwen, Llama 3, GPT-2 and Mistral families, among others)"
        )
    return {**spec, "truncation": None, "padding": None, "model": {**model, "dropout": None}}


def _without_control(spec: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A copy of a tokenizer.json that cannot produce an added token.

    Some tokenizers list their added tokens in the BPE vocabulary too, where merges, or `ignore_merges`,
    could still reach them: they leave the vocabulary, together with every merge that makes or uses one.
    """
    model = dict(spec["model"])
    control, blank = _split(spec)
    names = {token["content"] for token in control}
    if not names.isdisjoint(model["vocab"]):
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in names}
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if names.isdisjoint((a, b, a + b))]
        if model.get("unk_token") in names:
            model["unk_token"] = None
    if not _spells_every_text(model["vocab"]):
        raise UserError(
            f"the tokenizer in {path} cannot spell every text: it has neither a byte-level alphabet nor byte "
            "fallback, so parts of what is said would be lost; choose another model"
        )
    return {**spec, "added_tokens": blank, "post_processor": None, "model": model}


def _split(spec: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The added tokens: those that control, and those of nothing but white space, which are content.

    One that is not in the model's own vocabulary would get another id once the control tokens are out.
    """
    vocabulary = spec["model"]["vocab"]
    control: list[dict[str, Any]] = []
    blank: list[dict[str, Any]] = []
    for token in spec["added_tokens"]:
        content = str(token["content"])
        white = content.replace("▁", " ").isspace() and not token.get("special")
        (blank if white and vocabulary.get(content) == token["id"] else control).append(token)
    return control, blank


def _chat_template(config: Mapping[str, Any]) -> str | None:
    """The template, or of several named ones the default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def _spells_every_text(vocab: Mapping[str, int]) -> bool:
    """Whether every byte of UTF-8 has a token, as a letter of the byte-level alphabet or as `<0x0A>`."""
    letters = set(ByteLevel.alphabet()).difference(map(chr, _NEVER))  # those bytes stand for themselves
    return letters <= vocab.keys() or all(f"<0x{b:02X}>" in vocab for b in range(256) if b not in _NEVER)


def _build(spec: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as e:  # the tokenizers library raises nothing narrower
        raise UserError(f"{path / 'tokenizer.json'} is no tokenizer that can be read: {e}") from e


def _read_json(file: Path) -> dict[str, Any] | None:
    """The object in `file`, or None if there is no such file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file}: {e}; save the tokenizer again") from e
    if not isinstance(data, dict):
        raise UserError(f"{file} holds no JSON object; save the tokenizer again")
    return data

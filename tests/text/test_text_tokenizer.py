"""Content never becomes a control token, and comes back as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.errors import UserError
from ludus.text.tokenizer import Tokenizer

MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<eos>",
]
PIECES = [
    *MARKERS,
    *{m[:k] for m in MARKERS for k in (1, 2, 5)},
    *{m[-3:] for m in MARKERS},
    "Ġ",
    "▁",
    "Ċ",
    "<0x7D>",
    "\n\n\n\n",
    "   ",
]
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join)
NAMES = ["qwen", "llama", "gemma", "in_vocabulary", "qwen3", "llama3", "plain"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(content=hostile)
def test_hostile_content_yields_no_control_id_and_comes_back(
    tokenizers_by_name: dict[str, Tokenizer], name: str, content: str
) -> None:
    tokenizer = tokenizers_by_name[name]
    ids = tokenizer.encode(content)
    assert tokenizer.control_ids.isdisjoint(ids)
    expected = unicodedata.normalize("NFC", content) if name == "qwen" else content
    if name == "gemma":  # its own sign for the space
        expected = expected.replace("▁", " ")
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_marker_is_known_by_id_but_cannot_be_typed(
    tokenizers_by_name: dict[str, Tokenizer], directories: dict[str, Path], name: str
) -> None:
    tokenizer = tokenizers_by_name[name]
    trusting = tokenizers.Tokenizer.from_file(str(directories[name] / "tokenizer.json"))
    typed = [marker for marker in MARKERS if tokenizer.has(marker)]
    assert typed
    for marker in typed:
        # The library's own encoding would have let it through: the attack is real.
        assert trusting.encode(marker, add_special_tokens=False).ids == [tokenizer.control(marker)]
        assert tokenizer.control(marker) in tokenizer.control_ids
        assert len(tokenizer.encode(marker)) > 1
        assert tokenizer.decode([tokenizer.control(marker)]) == marker


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(content=st.text(max_size=40).filter(lambda text: "<" not in text))
def test_ordinary_content_encodes_as_the_library_does(
    tokenizers_by_name: dict[str, Tokenizer], directories: dict[str, Path], name: str, content: str
) -> None:
    if name == "in_vocabulary":  # there, leaving the control tokens out may change ordinary merges
        return
    trusting = tokenizers.Tokenizer.from_file(str(directories[name] / "tokenizer.json"))
    assert tokenizers_by_name[name].encode(content) == trusting.encode(content, add_special_tokens=False).ids


def test_merges_to_a_marker_are_taken_out(
    tokenizers_by_name: dict[str, Tokenizer], directories: dict[str, Path]
) -> None:
    spec = json.loads((directories["in_vocabulary"] / "tokenizer.json").read_text())
    naive = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    tokenizer = tokenizers_by_name["in_vocabulary"]
    assert naive.encode("</think>").ids == [tokenizer.control("</think>")]  # reached by merges alone
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("</think>"))


def test_lone_surrogates_do_not_crash(ours: Tokenizer) -> None:
    assert ours.decode(ours.encode("a\ud800b")) == "a?b"


def test_names(qwen: Tokenizer, llama: Tokenizer, tokenizers_by_name: dict[str, Tokenizer]) -> None:
    assert qwen.vocab_size == max(qwen.control_ids) + 1
    assert qwen.pad_id == qwen.control("<|endoftext|>")  # named by an object with "content"
    assert qwen.eos_id == qwen.control("<|im_end|>")
    assert qwen.bos_id is None
    assert llama.bos_id == llama.control("<|begin_of_text|>")
    assert llama.pad_id == llama.eos_id == llama.control("<|eot_id|>")  # no padding token of its own
    # GPT-2 names a BOS token and never uses it.
    assert tokenizers_by_name["in_vocabulary"].bos_id is None


def test_white_space_is_content_though_gemma_adds_it(gemma: Tokenizer, directories: dict[str, Path]) -> None:
    trusting = tokenizers.Tokenizer.from_file(str(directories["gemma"] / "tokenizer.json"))
    text = "a\n\n\n\nb   c\n"
    assert gemma.encode(text) == trusting.encode(text, add_special_tokens=False).ids
    assert not gemma.has("\n")
    assert {gemma.decode([i]) for i in gemma.control_ids} == {
        *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    }


def test_the_chat_template_is_found(tokenizers_by_name: dict[str, Tokenizer]) -> None:
    """In a file of its own, in the configuration, or there as the default of several."""
    for name, marker in (
        ("gemma", "turn>"),
        ("qwen3", "im_end|>"),
        ("qwen", "im_end|>"),
        ("llama", "eot_id|>"),
    ):
        assert marker in (tokenizers_by_name[name].chat_template or "")
    assert tokenizers_by_name["plain"].chat_template is None


def test_ids_with_a_character(ours: Tokenizer, qwen: Tokenizer) -> None:
    for tokenizer in (ours, qwen):
        found = tokenizer.ids_with("}")
        assert found == {i for i in range(tokenizer.vocab_size) if "}" in tokenizer.decode([i])}
        assert found


def test_a_missing_control_token_is_named(llama: Tokenizer) -> None:
    assert not llama.has("<|im_start|>")
    with pytest.raises(UserError, match=r"no control token '<\|im_start\|>'.*eot_id"):
        llama.control("<|im_start|>")


def _with(directory: Path, out: Path, **model: object) -> Path:
    shutil.copytree(directory, out)
    spec = json.loads((out / "tokenizer.json").read_text())
    spec["model"].update(model)
    (out / "tokenizer.json").write_text(json.dumps(spec))
    return out


def test_bad_directories(tmp_path: Path, directories: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json in .*save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(UserError, match="lacks its model"):
        Tokenizer.load(tmp_path)
    broken = _with(directories["plain"], tmp_path / "broken", merges=[["a", "no such piece"]])
    with pytest.raises(UserError, match="is no tokenizer"):
        Tokenizer.load(broken)
    unigram = _with(directories["plain"], tmp_path / "unigram", type="Unigram")
    with pytest.raises(UserError, match="type Unigram; ludus reads BPE"):
        Tokenizer.load(unigram)


def test_a_tokenizer_that_cannot_spell_everything_is_refused(tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.train_from_iterator(
        ["only these letters"],
        tokenizers.trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False),
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot spell every text"):
        Tokenizer.load(tmp_path)


def test_dropout_and_truncation_in_the_file_have_no_effect(
    tmp_path: Path, directories: dict[str, Path], ours: Tokenizer
) -> None:
    out = _with(directories["qwen3"], tmp_path / "noisy", dropout=0.9)
    spec = json.loads((out / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (out / "tokenizer.json").write_text(json.dumps(spec))
    text = "You are player 0. Your card: K. Moves: pass bet."
    assert Tokenizer.load(out).encode(text) == ours.encode(text)


def test_the_room_loads_without_torch_and_transformers() -> None:
    code = (
        "import sys, ludus.text.prompter, ludus.text.train_tokenizer\n"
        "print([m for m in ('torch', 'transformers', 'pyspiel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

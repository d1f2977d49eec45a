"""Models in and out of ordinary Hugging Face directories, and every way a directory can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import CHECKPOINTS, write_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner.forward import check_model
from ludus.learner.learner import Learner
from ludus.learner.model import check_context, load_model, save_model

BuildModel = Callable[..., PreTrainedModel]


@pytest.fixture
def directory(build_model: BuildModel, tmp_path: Path) -> Path:
    save_model(build_model(), tmp_path / "model")
    return tmp_path / "model"


def tokenizer_file(path: Path, size: int) -> None:
    Tokenizer(WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0")).save(str(path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back(build_model: BuildModel, tmp_path: Path, tied: bool) -> None:
    model = build_model(tie_word_embeddings=tied)
    save_model(model, tmp_path)
    tokens = torch.tensor([[1, 2, 3, 4]])
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    for back in (loaded, untouched):
        torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_other_weights_and_the_tokenizer_go_along(directory: Path, tmp_path: Path) -> None:
    tokenizer_file(directory / "tokenizer.json", 23)
    model = load_model(directory)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "out", like=directory, weights=doubled)
    back = load_model(tmp_path / "out")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, doubled[name])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_bfloat16(directory: Path) -> None:
    assert load_model(directory, "bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_checkpoint_in_bfloat16_and_several_files(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(name, tmp_path, torch.bfloat16, shard="20KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    model = load_model(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    for file in shards:
        for key, stored in load_file(file).items():
            assert stored.dtype is torch.bfloat16
            assert torch.equal(model.state_dict()[key], stored.float())
    shards[1].unlink()
    with pytest.raises(UserError, match=str(directory)):
        load_model(directory)


def test_capped_attention_scores(tmp_path: Path) -> None:
    """Gemma 2 caps the scores, which one of the attentions of transformers does and the others refuse."""
    config = Gemma2Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=1.0,
        attn_logit_softcapping=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    check_model(model)
    tokens = torch.tensor([[1, 2, 3, 4]])
    capped = model(tokens).logits
    for layer in model.base_model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(model(tokens).logits, capped, atol=1e-3)


CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class OwnConfig(Qwen3Config):
    model_type = "own_qwen"


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_the_directory_runs_only_where_it_is_trusted(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "own.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_qwen", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"Python code of its own.*model\.trust_remote_code = true"):
        load_model(directory)
    assert capsys.readouterr().err == ""
    model = load_model(directory, trust_remote_code=True)
    assert "warning: model.trust_remote_code is on" in capsys.readouterr().err
    assert type(model).__name__ == "OwnForCausalLM"
    save_model(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "own.py").is_file()  # a checkpoint can be loaded as its origin was
    again = load_model(tmp_path / "saved", trust_remote_code=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_missing_pieces_are_named(directory: Path) -> None:
    with pytest.raises(UserError, match=r"no model directory at .*nowhere"):
        load_model(directory / "nowhere")
    weights = directory / "model.safetensors"
    weights.rename(directory / "weights.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        load_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(directory)


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_cut_off_weights(directory: Path, keep: int) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot read the model"):
        load_model(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_model"}', "{}"])
def test_a_bad_config(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(directory)):
        load_model(directory)


def test_weights_that_do_not_fit_the_config(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 tensors are missing or have another shape, such as model\.norm\.weight"
    ):
        load_model(directory)


def test_weights_of_another_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] = 32
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"6 tensors are missing or have another shape, such as model\.layers\.0\.mlp"
    ):
        load_model(directory)


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    config = T5Config(vocab_size=23, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal language model"):
        load_model(tmp_path)


def test_an_encoder_that_looks_ahead_is_refused() -> None:
    config = BertConfig(
        vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.initializer_range = 1.0
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="BertLMHeadModel"):
        Learner(model, LossConfig(), OptimConfig(), max_tokens=4, total_steps=1)


def test_a_tokenizer_with_more_ids_than_the_model(directory: Path) -> None:
    tokenizer_file(directory / "tokenizer.json", 23)
    load_model(directory)
    tokenizer_file(directory / "tokenizer.json", 24)
    with pytest.raises(UserError, match="ids up to 23 but the model embeds only 23"):
        load_model(directory)


def test_a_context_that_is_too_short(build_model: BuildModel) -> None:
    check_context(build_model(), 64)
    with pytest.raises(UserError, match=r"at most 64 tokens .* needs 65"):
        check_context(build_model(), 65)

"""Adapters over a frozen base: what learns, what is shared, what is written, and what does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_models import make_model, make_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ludus.config import AdapterConfig, LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner import adapters
from ludus.learner.batching import collate
from ludus.learner.forward import token_terms
from ludus.learner.learner import Learner
from ludus.learner.model import save_model

ADAPTER = AdapterConfig(rank=3, alpha=6)
LOSS = LossConfig(magnet_kl=0.2, magnet_every=3, reference_kl=0.1, entropy=0.01)
OPTIM = OptimConfig(lr=1e-2, epochs=2, minibatches=2, microbatch_tokens=40, average=0.9)
_Q = "model.layers.0.self_attn.q_proj."


def learner(model: PreTrainedModel, loss: LossConfig = LOSS, optim: OptimConfig = OPTIM) -> Learner:
    return Learner(model, loss, optim, max_tokens=8, total_steps=6, seed=3)


def stirred(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """The same with random halves instead of B = 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model


def weights_of(made: Learner) -> dict[str, Tensor]:
    return {adapters.peft_name(name): tensor.clone() for name, tensor in made.weights().items()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(20)[None]).logits
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base on the disk."""
    save_model(make_model(), tmp_path / "base")
    return tmp_path / "base"


def written(home: Path, to: Path, config: AdapterConfig = ADAPTER, seed: int = 5) -> PreTrainedModel:
    """A random adapter of it in `to`; the model that has it."""
    model = stirred(adapters.attach(make_model(), config, 0), seed)
    named = {adapters.peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    adapters.save(named, to, config, adapters.base_facts(home))
    return model


# --- what learns ---


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_its_seed() -> None:
    base = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (adapters.attach(base, ADAPTER, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one), logits(base))
    a = [dict(m.named_parameters())[_Q + "lora_A.default.weight"] for m in (one, same, other)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])


def test_two_policies_and_all_their_copies_share_one_base() -> None:
    base = make_model()
    made = [learner(adapters.attach(base, ADAPTER, seed)) for seed in (1, 2)]
    before = {name: p.clone() for name, p in base.named_parameters()}
    for one in made:
        one.update(make_rows(6))
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    theirs = {p.data_ptr() for p in base.parameters()}
    for model in (m for one in made for m in (one.model, one.magnet, one.reference)):
        assert model is not None
        assert theirs <= {p.data_ptr() for p in model.parameters()}
        own = [p for n, p in model.named_parameters() if "lora_" in n]
        assert theirs.isdisjoint(p.data_ptr() for p in own)
        assert sum(p.numel() for p in own) < 0.5 * sum(p.numel() for p in base.parameters())
    assert all(t.shape[0] == 3 or t.shape[1] == 3 for one in made for t in one.weights().values())


def test_the_gradient_is_that_of_the_merged_weights() -> None:
    """By the chain rule: with W + s B A, the gradient of A is s B^T dW and that of B is s dW A^T."""
    model = stirred(adapters.attach(make_model(), ADAPTER, 0))
    whole = copy.deepcopy(make_model())
    halves = dict(model.named_parameters())
    scale = ADAPTER.alpha / ADAPTER.rank
    with torch.no_grad():
        for name, p in whole.named_parameters():
            at = name.removesuffix("weight")
            if f"{at}lora_A.default.weight" in halves:
                p += scale * halves[f"{at}lora_B.default.weight"] @ halves[f"{at}lora_A.default.weight"]
    batch = collate(make_rows(5), torch.device("cpu"))
    for one in (model, whole):
        loss = token_terms(one, batch, 1.0).logprobs.sum()
        loss.backward()  # type: ignore[no-untyped-call]
    checked = 0
    for name, p in whole.named_parameters():
        at = name.removesuffix("weight")
        if f"{at}lora_A.default.weight" in halves:
            a, b = halves[f"{at}lora_A.default.weight"], halves[f"{at}lora_B.default.weight"]
            assert p.grad is not None
            torch.testing.assert_close(a.grad, scale * b.T @ p.grad, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(b.grad, scale * p.grad @ a.T, rtol=1e-3, atol=1e-4)
            checked += 1
    assert checked == 14
    assert {n for n, p in halves.items() if p.grad is not None} == {n for n in halves if "lora_" in n}


def test_reinforcement_goes_where_full_training_would() -> None:
    """An adapter learns the same rows: the likelihood of what paid rises."""
    rows = make_rows(4)
    paid = [
        type(r)(r.tokens, r.mask, r.logprobs, [1.0 if m else 0.0 for m in r.mask], r.turn_ids, "g", "r")
        for r in rows
    ]
    made = learner(adapters.attach(make_model(), ADAPTER, 0), LossConfig(is_cap=1e9), OptimConfig(lr=2e-2))
    batch = collate(paid, torch.device("cpu"))
    before = token_terms(made.model, batch, 1.0).logprobs.mean()
    for _ in range(15):
        made.update(paid)
    assert token_terms(made.model, batch, 1.0).logprobs.mean() > before + 0.5


def test_a_bfloat16_base_stays_as_it_is_and_its_adapter_learns_in_float32() -> None:
    base = make_model().to(torch.bfloat16)
    made = learner(adapters.attach(base, ADAPTER, 0))
    figures = made.update(make_rows(6))
    assert figures["grad_norm"] > 0
    for name, p in made.model.named_parameters():
        assert p.dtype is (torch.float32 if "lora_" in name else torch.bfloat16)
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in made.model.parameters()}


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        base = make_model()
        if checkpointing:
            base.gradient_checkpointing_enable()
        made = learner(stirred(adapters.attach(base, ADAPTER, 0)))
        found.append(made.update(make_rows(6)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# --- states and files ---


def test_a_state_holds_the_adapter_alone_and_resumes_exactly() -> None:
    batches = [make_rows(6, seed=s) for s in range(4)]
    whole = learner(adapters.attach(make_model(), ADAPTER, 0))
    figures = [whole.update(b) for b in batches]
    first = learner(adapters.attach(make_model(), ADAPTER, 0))
    for b in batches[:2]:
        first.update(b)
    tensors, values = first.state()
    assert all("lora_" in name for name in tensors)
    assert {name.split(".")[0] for name in tensors} == {
        "model",
        "optimizer",
        "magnet",
        "reference",
        "average",
    }
    second = learner(adapters.attach(make_model(), ADAPTER, 99))  # all of the adapter comes from the state
    second.load_state(tensors, json.loads(json.dumps(values)))
    assert [second.update(b) for b in batches[2:]] == figures[2:]
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, second.state()[0][name])


def test_peft_reads_what_we_write_and_the_same_bytes_come_twice(home: Path, tmp_path: Path) -> None:
    model = written(home, tmp_path / "a")
    written(home, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    theirs = PeftModel.from_pretrained(make_model(), tmp_path / "a")
    assert torch.equal(logits(theirs), logits(model))
    merged = adapters.merged(make_model(), tmp_path / "a")
    assert type(merged) is type(make_model())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_we_read_what_peft_writes(home: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(make_model(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    found = adapters.read(tmp_path / "theirs", "base")
    assert (found.base, found.rank, found.alpha) == ("base", 3, 6.0)
    adapters.check_base(tmp_path / "theirs", home, "policy 'a'")  # nobody knows its base's bytes
    mine = adapters.attach(make_model(), ADAPTER, 0)
    adapters.put(mine, found, tmp_path / "theirs")
    assert same(weights_of(learner(mine)), load_file(tmp_path / "theirs" / "adapter_model.safetensors"))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, r"rank 3, alpha 6\) is built otherwise than the recipe says \(adapter.rank = 4"),
        ({"alpha": 7}, r"adapter.alpha = 7"),
        ({"targets": ("q_proj",)}, r"adapter.targets = \['q_proj'\]"),
    ],
)
def test_a_start_of_another_build_is_refused(
    changes: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    written(home, tmp_path / "a")
    model = adapters.attach(make_model(), ADAPTER.model_copy(update=changes), 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=said):
        adapters.put(model, adapters.read(tmp_path / "a", "base"), tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'; only LORA is read"),
        ({"use_dora": True}, r"no plain LoRA \(use_dora\); merge it"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, r"no plain LoRA \(bias, modules_to_save\)"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    told: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    written(home, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    with pytest.raises(UserError, match=said):
        adapters.read(tmp_path / "a", "base")


def test_damaged_files_are_named(home: Path, tmp_path: Path) -> None:
    written(home, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"cannot read the adapter in .*a: "):
        adapters.read(tmp_path / "a", "base")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*adapter_config.json"):
        adapters.read(tmp_path / "a", "base")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 29}, "belongs to a base with vocab_size = 23, but .* has 29; its base is "),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 2, but .* has 3"),
        ({}, "belongs to other weights than those in"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_an_adapter_of_another_base_is_refused(
    changes: dict[str, Any], said: str, ours: bool, home: Path, tmp_path: Path
) -> None:
    written(home, tmp_path / "a")
    save_model(make_model(seed=1, **changes), tmp_path / "other")
    if not ours:  # peft's files alone tell of the base by its path
        (tmp_path / "a" / "base.json").unlink()
        if not changes:
            return adapters.check_base(tmp_path / "a", tmp_path / "other", "it")  # nobody can know
    with pytest.raises(UserError, match=said):
        adapters.check_base(tmp_path / "a", tmp_path / "other", "opponent 'x'")
    adapters.check_base(tmp_path / "a", home, "opponent 'x'")
    return None

"""Whether a checkpoint can be trained and sampled here: what training would trip over, measured and told.

The model is loaded as training loads it, in float32, so this takes its time and memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludus.errors import UserError
from ludus.text.templates import Template, detect
from ludus.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TALK = (("user", "Good morning."), ("assistant", "Hello."), ("user", "Your move."))
_TOKENS = 16  # that the engine is tried on
_ODD = 1e-3  # nats by which it may differ from the model itself


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `passed` is None for what one ought to know and that hinders nothing."""

    check: str
    passed: bool | None
    evidence: str


def examine(directory: Path, template: str = "auto") -> list[Finding]:
    """All checks of a model directory; what cannot be checked after a failure is left out."""
    return list(_findings(directory, template))


def _findings(directory: Path, wanted: str) -> Iterator[Finding]:
    try:
        tokenizer = Tokenizer.load(directory)
        controls = len(tokenizer.control_ids)
        yield Finding("tokenizer", True, f"{tokenizer.vocab_size:,} ids, {controls} of them control tokens")
    except UserError as e:
        yield Finding("tokenizer", False, str(e))
    else:
        try:
            template = detect(tokenizer, wanted)
            thoughts = "opens thoughts" if template.think_ids else "has no marks for thoughts"
            yield Finding("chat template", True, f"{template.name}, {thoughts}")
            yield _own_prompt(directory, tokenizer, template)
        except UserError as e:
            yield Finding("chat template", False, str(e))
    yield from _model(directory)


def _own_prompt(directory: Path, tokenizer: Tokenizer, template: Template) -> Finding:
    """Our prompt beside that of the directory's own template, as transformers renders it."""
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": role, "content": content} for role, content in _TALK]
    try:
        theirs: Any = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        own = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (TemplateError, ValueError, OSError, KeyError, TypeError) as e:
        return Finding("prompt", None, f"the directory's own template cannot be rendered: {e}")
    ours = template.open(_TALK, think=True)
    if ours[: len(own)] == own:
        more = tokenizer.decode(ours[len(own) :])
        return Finding("prompt", True, "as by the directory's own" + (f", and then {more!r}" if more else ""))
    apart = next(i for i in range(len(own)) if ours[i : i + 1] != own[i : i + 1])
    told = [repr(tokenizer.decode(ids[max(0, apart - 3) : apart + 12])) for ids in (own, ours)]
    return Finding("prompt", None, f"where the directory's own has {told[0]}, ludus has {told[1]}")


def _model(directory: Path) -> Iterator[Finding]:
    from ludus.learner.forward import check_model
    from ludus.learner.model import load_model
    from ludus.learner.packing import prepare

    try:
        model = load_model(directory)
    except UserError as e:
        yield Finding("model", False, str(e))
        return
    count = sum(p.numel() for p in model.parameters())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    reach = f", sees {limit:,} tokens" if limit else ""
    yield Finding("model", True, f"{type(model).__name__}, {count:,} parameters{reach}")
    try:
        check_model(model)
        yield Finding("learner", True, "the model's own log-probabilities can be recomputed")
    except UserError as e:
        yield Finding("learner", False, str(e))
        return
    yield _engine(model)
    try:
        prepare(model)
        yield Finding("packed rows", True, "optim.batching = 'packed' may be used")
    except UserError as e:
        yield Finding("packed rows", None, str(e))


def _engine(model: PreTrainedModel) -> Finding:
    """The torch engine's log-probabilities of a few tokens beside the model's."""
    import torch

    from ludus.engines.torch_engine import TorchEngine

    try:
        engine = TorchEngine.from_model(model, slots=1, context=_TOKENS)
    except UserError as e:
        return Finding("torch engine", False, str(e))
    ids = [engine.arch.vocab * k // _TOKENS for k in range(_TOKENS)]
    (found,) = asyncio.run(engine.score("self", [ids[:1]], [ids[1:]]))
    with torch.no_grad():
        every = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    gap = float((torch.tensor(found) - wanted).abs().max())
    return Finding("torch engine", gap < _ODD, f"differs from the model by {gap:.0e} nats per token at most")

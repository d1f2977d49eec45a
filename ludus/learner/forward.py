"""What a model says about the trained tokens of a batch, without ever holding logits for all positions.

Shape legend: B rows, T positions, N trained tokens, D hidden width, V vocabulary.

The decoder runs over [B, T]; the output head is applied only to the hidden states that predict a trained
token, and where even their logits are many, a block of the vocabulary at a time (learner/head.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ludus.errors import UserError
from ludus.learner.head import Head, Terms, head_terms, logits_of
from ludus.learner.narrow import asked
from ludus.learner.packing import decode, is_prepared, starts
from ludus.types import Batch


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden states [N, D] that predict the trained tokens: those of the position before each.

    No attention mask is needed: rows are padded on the right and the attention is causal. A model that was
    prepared for it reads the rows end to end, without their padding.
    """
    row_N, position_N = batch.mask.nonzero(as_tuple=True)
    rows, width = batch.tokens.shape
    if is_prepared(model):
        places_N = starts(batch.lengths)[row_N] + position_N - 1
        with asked(places_N, 1, int(batch.lengths.sum())):
            return decode(model, batch.tokens, batch.lengths)[places_N]
    places_N = row_N * width + position_N - 1
    with asked(places_N, rows, width):
        states_BTD = model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    picked: Tensor = states_BTD.flatten(0, 1)[places_N]
    return picked


def token_terms(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    other: PreTrainedModel | None = None,
    entropy_gradient: bool = False,
) -> Terms:
    """Log-probability, entropy and, with `other`, the exact KL to it, of each trained token.

    All are those of the distribution at `temperature`, the one that was sampled from. `other` gets no
    gradient; the entropy only where `entropy_gradient` asks for it.
    """
    targets_N = batch.tokens[batch.mask]
    states_ND = hidden_states(model, batch)
    other_ND = None
    if other is not None:
        with torch.no_grad():
            other_ND = hidden_states(other, batch)

    theirs = None if other is None or other_ND is None else (other_ND, _head(other))
    return head_terms(states_ND, targets_N, _head(model), temperature, theirs, entropy_gradient)


def spread(values_N: Tensor, batch: Batch) -> Tensor:
    """Per-token values [N] laid out as [B, T], 0.0 outside the mask."""
    empty = torch.zeros(batch.mask.shape, dtype=values_N.dtype, device=values_N.device)
    return empty.masked_scatter(batch.mask, values_N)


def check_model(model: PreTrainedModel) -> None:
    """Raise UserError unless decoder and output head can be run apart and the attention is causal.

    Some architectures scale their logits after the head; their log-probabilities would be wrong here.
    Measured on four tokens, not believed.
    """
    name = type(model).__name__
    linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if linear is None:
        raise UserError(f"{name} has no output head; a causal language model is needed")
    if type(linear) is not torch.nn.Linear:
        raise UserError(
            f"the output head of {name} is a {type(linear).__name__}, but the learner computes with a plain "
            "linear layer; leave the head without adapter or quantisation"
        )
    device = next(model.parameters()).device
    tokens = torch.tensor([[0, 1], [0, 2]], device=device)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        apart = logits_of(_head(model), model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    if not whole.isfinite().all():
        raise UserError(
            f"{name} gives logits that are not finite: its weights are damaged; copy or make it again"
        )
    if not torch.allclose(whole.float(), apart.float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{name} changes its logits after the output head (scaling), which the learner does not "
            "reproduce; use an architecture without it, such as Qwen3 or Llama"
        )
    if not torch.allclose(whole[0, 0].float(), whole[1, 0].float(), rtol=1e-2, atol=1e-2):
        raise UserError(f"{name} looks ahead: its attention is not causal, so it cannot generate text")


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Set torch's process-wide precision of float32 matrix products, and put the old one back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _head(model: PreTrainedModel) -> Head:
    linear: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(linear.weight, linear.bias, cap)

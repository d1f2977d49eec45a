"""The last layer works for the asked tokens alone.

Of a dialogue few tokens are trained, one in six of tic-tac-toe's, and nothing reads the last layer's output
at the others: there its keys and values are needed, and neither its MLP nor what attention adds. Both are
computed token by token, so leaving the others out changes no result. In a model of four layers that is a
sixth of the learner's time; in one of forty it is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# The asked places [N] in the flat tokens of a forward pass, and the shape [B, T] that those have. A variable
# of the context, because threads run one model on micro-batches of their own.
_ASKED: ContextVar[tuple[Tensor, tuple[int, int]] | None] = ContextVar("asked", default=None)


@contextmanager
def asked(places_N: Tensor, rows: int, width: int) -> Iterator[None]:
    """In this block a model that was narrowed is right at `places_N` of its `rows` * `width` tokens alone."""
    token = _ASKED.set((places_N, (rows, width)))
    try:
        yield
    finally:
        _ASKED.reset(token)


def narrow(model: PreTrainedModel) -> None:
    """Let the last layer of `model` heed `asked`, if it is built of parts that take token by token.

    Measured on tokens, not believed: a layer that is not stays as it is. So does one that is recomputed in
    the backward pass (gradient checkpointing), which does not know what was asked.
    """
    layers: Any = getattr(model.base_model, "layers", None)
    if not layers or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return
    attention = getattr(layers[-1], "self_attn", None)
    parts = [getattr(layers[-1], "mlp", None), getattr(attention, "o_proj", None)]
    hooks: list[Any] = []
    for part in parts:
        if isinstance(part, torch.nn.Module):
            hooks += [part.register_forward_pre_hook(_take), part.register_forward_hook(_put)]
    tokens = torch.tensor([[0, 1, 2, 3], [2, 1, 0, 0]], device=next(model.parameters()).device)
    places = torch.tensor([1, 3, 4], device=tokens.device)
    with torch.no_grad():
        whole = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        with asked(places, *tokens.shape):
            some = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    if not torch.allclose(whole[places].float(), some[places].float(), rtol=1e-2, atol=1e-2):
        for hook in hooks:
            hook.remove()


def _take(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    found = _ASKED.get()
    return None if found is None else (args[0].flatten(0, -2)[found[0]][None], *args[1:])  # [1, N, D]


def _put(module: torch.nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    found = _ASKED.get()
    if found is None:
        return None
    places_N, (rows, width) = found
    some, *more = out if isinstance(out, tuple) else (out,)  # of experts, also how they were chosen
    whole = some.new_zeros(rows * width, some.shape[-1])
    whole = whole.index_copy(0, places_N, some.flatten(0, -2)).unflatten(0, (rows, width))
    return (whole, *more) if isinstance(out, tuple) else whole

"""Rows end to end: the decoder reads a micro-batch as one sequence without padding, and no row sees another.

Position ids begin anew with every row, and attention is computed within each row alone. transformers hands
the lengths of the rows through to the attention, which is registered here under a name of its own:

    CUDA, 16 bits   torch's `varlen_attn`, one kernel for all rows
    elsewhere       `scaled_dot_product_attention` over the rows of one length after the other

transformers would also mask a packed sequence by itself, by a matrix [T, T] over all its tokens, most of
which is thrown away: 20 rows of 100 tokens then cost 20 times the attention of the rows alone.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ludus.errors import UserError

NAME = "ludus_packed"


class Packed(NamedTuple):
    """Where the rows of a packed sequence lie."""

    lengths: tuple[int, ...]
    ends: Tensor  # int32 [B + 1], 0 and where each row ends


def starts(lengths_B: Tensor) -> Tensor:
    """Where each row begins [B] in the tokens of all, end to end."""
    return F.pad(lengths_B.cumsum(0)[:-1], (1, 0))


def decode(model: PreTrainedModel, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """The hidden states [T', D] of all tokens, end to end.

    `tokens_BT` is padded on the right; `model` was prepared.
    """
    lengths = tuple(lengths_B.tolist())
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    real_BT = place_T < lengths_B[:, None]
    ends = F.pad(lengths_B.cumsum(0), (1, 0))
    states: Tensor = model.base_model(
        input_ids=tokens_BT[real_BT][None],
        position_ids=place_T.expand_as(real_BT)[real_BT][None],
        use_cache=False,
        packed=Packed(lengths, ends.int()),
    ).last_hidden_state[0]
    return states


def is_prepared(model: PreTrainedModel) -> bool:
    """Whether `model`, or what it is a copy of, was prepared."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def prepare(model: PreTrainedModel) -> None:
    """Let `model` read packed rows. Raises UserError if it cannot: measured on tokens, not believed."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    fits = kinds <= {"full_attention", "sliding_attention"} and model._supports_attention_backend
    if fits and not getattr(config, "attn_logit_softcapping", None):
        tokens = torch.tensor([[0, 1, 2, 3], [2, 1, 0, 0]], device=model.device)
        with torch.no_grad():
            padded = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            model.set_attn_implementation(NAME)
            packed = decode(model, tokens, torch.tensor([4, 2], device=model.device))
        padded = torch.cat([padded[0], padded[1, :2]])
        if torch.allclose(padded.float(), packed.float(), rtol=1e-2, atol=1e-2):
            return
    raise UserError(f"{name} cannot be trained on packed rows; set optim.batching = 'sorted'")


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [B, H, T, D] over key and value [B, K, T, D]; [B, T, H, D].

    Packed rows come as a batch of one. The interface is that of transformers.
    """
    if packed is None:
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    one_kernel = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = _varlen if one_kernel else _rows
    return attend(query, key, value, packed, scaling, sliding_window), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """All rows by one kernel, which counts a window without the position itself."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    ends, longest = packed.ends, max(packed.lengths)
    span = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=span, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[None]


def _rows(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """Row by row, neighbours of one length together."""
    runs = [(length, len(list(run))) for length, run in groupby(packed.lengths)]
    sizes = [length * count for length, count in runs]
    parts = zip(runs, *(torch.split(x[0], sizes, dim=1) for x in (query, key, value)), strict=True)
    out = []
    for (length, count), *qkv in parts:
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # [count, heads, length, D]
        out.append(_causal(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None]


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        place = torch.arange(length, device=q.device)
        mask = (place <= place[:, None]) & (place > place[:, None] - window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _no_mask(*_: Any, **__: Any) -> None:
    """The attention sees to it by itself."""


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)

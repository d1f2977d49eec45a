"""The forward passes of a Llama-like decoder over a slot KV cache.

Three passes: `prefill` (fresh prompts, right-padded), `decode` (one more token for a range of rows) and
`hidden` (whole sequences, no cache). Right padding needs no mask: a causal position never sees what comes
after it, and a row's cache is only read up to the row's own position.

Shapes: N rows, M tokens per row, S span (cached positions per row), H query heads, K key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ludus.engines.weights import Architecture, Layer, Weights

Attention = Literal["bmm", "sdpa"]
_STEP = 32  # granularity of the span
_BMM_TOKENS = 1024  # longer prompts never go through bmm: it holds all M x M products at once


class Cache:
    """Keys and values of all rows: one tensor per layer and kind, allocated once.

    Attention runs over whole contiguous [rows, K, span, D] views, where the span follows the longest row in
    use instead of the full context; changing it copies the live rows.
    """

    def __init__(
        self, arch: Architecture, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.context, self.span = slots, context, 0
        self._heads, self._size = arch.kv_heads, arch.head_dim
        count = slots * arch.kv_heads * context * arch.head_dim
        self._flat = [torch.zeros(count, dtype=dtype, device=device) for _ in range(2 * arch.layers)]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._view(min(_STEP, context))

    def reserve(self, positions: int, rows: int) -> None:
        """Make room for `positions` tokens per row, keeping what the first `rows` rows hold."""
        assert positions <= self.context
        roomy = min(self.context, _round_up(positions + max(_STEP, positions // 8)))
        if self.span < positions or self.span > 2 * roomy:
            self._resize(roomy, rows)

    def move(self, old: Tensor, new: Tensor, positions: int) -> None:
        """Copy rows `old` to rows `new` [N], as if all at once."""
        for cache in (*self.keys, *self.values):
            cache[new, :, :positions] = cache[old, :, :positions]

    def wipe(self) -> None:
        """Forget everything. A NaN once written would otherwise poison rows through 0 * NaN."""
        for flat in self._flat:
            flat.zero_()

    def _resize(self, span: int, rows: int) -> None:
        keep = min(span, self.span)
        held = [cache[:rows, :, :keep].clone() for cache in (*self.keys, *self.values)] if rows else []
        self._view(span)
        for cache, kept in zip((*self.keys, *self.values), held, strict=False):
            cache[:rows, :, :keep] = kept

    def _view(self, span: int) -> None:
        self.span = span
        count = self.slots * self._heads * span * self._size
        views = [flat[:count].view(self.slots, self._heads, span, self._size) for flat in self._flat]
        self.keys, self.values = views[0::2], views[1::2]


class Decoder:
    """Runs any `Weights` of one architecture. Holds the rope tables and no other state."""

    def __init__(
        self,
        arch: Architecture,
        rope: tuple[Tensor, Tensor],
        attention: Attention,
    ) -> None:
        self.arch = arch
        self.cos, self.sin = rope
        self.attention = attention

    def prefill(self, weights: Weights, ids: Tensor, last: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """Run prompts ids [N, M] into the cache's rows [N]; logits [N, V] after position last [N]."""
        n, m = ids.shape
        position = torch.arange(m, device=ids.device).repeat(n)
        pick = torch.arange(n, device=ids.device) * m + last
        causal = self._causal(m, ids.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(n, m, -1, self.arch.head_dim).transpose(1, 2) for x in (q, k, v))
            cache.keys[layer][rows, :, :m] = k
            cache.values[layer][rows, :, :m] = v
            return self._attend_prompt(q, k, v, causal)

        x = self._layers(weights, ids.flatten(), position, attend, pick)
        return F.linear(x, weights.head)

    def decode(
        self, weights: Weights, token: Tensor, position: Tensor, cache: Cache, first: int, end: int
    ) -> Tensor:
        """One token [N] at its position [N] per row of [first, end); logits [N, V]."""
        a, n = self.arch, end - first
        rows = torch.arange(first, end, device=token.device)
        hidden = (torch.arange(cache.span, device=token.device) > position[:, None])[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][rows, :, position] = k
            cache.values[layer][rows, :, position] = v
            keys, values = cache.keys[layer][first:end], cache.values[layer][first:end]
            grouped = q.view(n, a.kv_heads, -1, a.head_dim)
            if self.attention == "sdpa":
                out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=~hidden)
            else:
                out = _bmm_attention(grouped, keys, values, hidden, a.head_dim**-0.5)
            return out.reshape(n, -1)

        x = self._layers(weights, token, position, attend, None)
        return F.linear(x, weights.head)

    def hidden(self, weights: Weights, ids: Tensor) -> Tensor:
        """Final normed hidden states [N, M, hidden] of right-padded sequences ids [N, M]; no cache."""
        n, m = ids.shape
        position = torch.arange(m, device=ids.device).repeat(n)
        causal = self._causal(m, ids.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(n, m, -1, self.arch.head_dim).transpose(1, 2) for x in (q, k, v))
            return self._attend_prompt(q, k, v, causal)

        return self._layers(weights, ids.flatten(), position, attend, None).view(n, m, -1)

    def _layers(
        self,
        weights: Weights,
        ids: Tensor,
        position: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        pick: Tensor | None,
    ) -> Tensor:
        """All blocks over flat tokens [N * M]; after the last attention only the tokens of `pick` go on."""
        a = self.arch
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        x = F.embedding(ids, weights.embed)
        for i, layer in enumerate(weights.layers):
            out = attend(i, *self._project(layer, x, cos, sin))
            if pick is not None and i == a.layers - 1:
                x, out = x[pick], out[pick]
            x = x + F.linear(out, layer.out, layer.out_bias)
            y = F.rms_norm(x, (a.hidden,), layer.mlp_norm, a.eps)
            gate, up = F.linear(y, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return F.rms_norm(x, (a.hidden,), weights.norm, a.eps)

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [N, H, D] and k [N, K, D], and v [N, K, D], of flat tokens x [N, hidden]."""
        a = self.arch
        y = F.rms_norm(x, (a.hidden,), layer.attention_norm, a.eps)
        qkv = F.linear(y, layer.qkv, layer.qkv_bias).view(len(x), -1, a.head_dim)
        qk, v = qkv[:, : a.heads + a.kv_heads], qkv[:, a.heads + a.kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (a.head_dim,), None, a.eps) * layer.qk_norm
        half = a.head_dim // 2
        swapped = torch.cat([qk[..., half:], qk[..., :half]], -1)
        qk = torch.addcmul(qk * cos, swapped, sin)
        return qk[:, : a.heads], qk[:, a.heads :], v

    def _causal(self, m: int, device: torch.device) -> Tensor | None:
        """True where a query may not look [M, M]; None where the attention kernel knows by itself."""
        if self.attention == "sdpa" or m > _BMM_TOKENS:
            return None
        return torch.ones(m, m, dtype=torch.bool, device=device).triu_(1)

    def _attend_prompt(self, q: Tensor, k: Tensor, v: Tensor, causal: Tensor | None) -> Tensor:
        """Causal attention of q [N, H, M, D] over k, v [N, K, M, D]; returns [N * M, H * D]."""
        n, heads, m, size = q.shape
        if causal is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != heads)
        else:
            groups = q.reshape(
                n, k.shape[1], -1, size
            )  # a group's heads one after the other: [N, K, G * M, D]
            repeated = causal.repeat(heads // k.shape[1], 1)
            out = _bmm_attention(groups, k, v, repeated, size**-0.5).view(n, heads, m, size)
        return out.transpose(1, 2).reshape(n * m, heads * size)


def _bmm_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Attention by plain products: q [N, K, Q, D] over k, v [N, K, S, D], True in `hidden` = may not look."""
    scores = torch.matmul(q * scale, k.transpose(-1, -2)).masked_fill_(hidden, float("-inf"))
    return torch.matmul(scores.softmax(-1), v)


def _round_up(count: int) -> int:
    return -(-count // _STEP) * _STEP

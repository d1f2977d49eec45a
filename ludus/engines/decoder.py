"""The forward passes of a Llama-like decoder over a slot KV cache.

Three passes: `prefill` (fresh prompts, right-padded), `decode` (one more token for a range of rows) and
`hidden` (whole sequences, no cache). Right padding needs no mask: a causal position never sees what comes
after it, and a row's cache is only read up to the row's own position.

Shapes: N rows, M tokens per row, S span (cached positions per row), H query heads, K key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ludus.engines.low_rank import Change
from ludus.engines.weights import Architecture, Layer, Weights

Attention = Literal["bmm", "sdpa"]
_STEP = 32  # granularity of the span
_BLOCK = 64  # queries of a prompt that attend together


class Cache:
    """Keys and values of all rows: one tensor per layer and kind, allocated once.

    Attention runs over whole contiguous [rows, K, span, D] views, where the span follows the longest row in
    use instead of the full context; changing it copies the live rows. `few_spans`: it takes four values from
    each power of two to the next, at the price of some positions that nobody needs.
    """

    def __init__(
        self,
        arch: Architecture,
        slots: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        few_spans: bool = False,
    ) -> None:
        self.slots, self.context, self.span = slots, context, 0
        self._few = few_spans
        self._heads, self._size = arch.kv_heads, arch.head_dim
        count = slots * arch.kv_heads * context * arch.head_dim
        self._flat = [torch.zeros(count, dtype=dtype, device=device) for _ in range(2 * arch.layers)]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._view(min(_STEP, context))

    def reserve(self, positions: int, rows: int) -> None:
        """Make room for `positions` tokens per row, keeping what the first `rows` rows hold."""
        assert positions <= self.context
        wanted = positions + max(_STEP, positions // 8)
        step = max(_STEP, 1 << wanted.bit_length() - 3) if self._few else _STEP
        roomy = min(self.context, -(-wanted // step) * step)
        if self.span < positions or self.span > 2 * roomy:
            self._resize(roomy, rows)

    def move(self, old: Tensor, new: Tensor, positions: int) -> None:
        """Copy rows `old` to rows `new` [N], as if all at once."""
        for cache in (*self.keys, *self.values):
            cache[new, :, :positions] = cache[old, :, :positions]

    def copy(self, row: int, positions: int) -> Tensor:
        """What a row holds of its first S = `positions` tokens: [2 * layers, K, S, D]."""
        return torch.stack([cache[row, :, :positions] for cache in (*self.keys, *self.values)])

    def put(self, row: int, caches: Tensor) -> None:
        """Have a row begin with what `copy` gave."""
        for cache, kept in zip((*self.keys, *self.values), caches, strict=True):
            cache[row, :, : kept.shape[1]] = kept

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
        self, arch: Architecture, ropes: Mapping[str, tuple[Tensor, Tensor]], attention: Attention
    ) -> None:
        """`ropes` holds cosines and sines [context, D] per layer type, as `rope_tables` gives."""
        self.arch = arch
        self.ropes = ropes
        self.attention = attention
        table = next(iter(ropes.values()))[0]
        context, self._dtype = len(table), table.dtype
        # Rounded before it is used, as Hugging Face does it.
        self._embed_scale = None if arch.embed_scale is None else table.new_tensor(arch.embed_scale)
        seen = arch.window if arch.window is not None and arch.window < context else None
        self._windows = {kind: seen if kind == "sliding_attention" else None for kind in ropes}

    def prefill(self, weights: Weights, ids: Tensor, last: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """Run prompts ids [N, M] into the cache's rows [N]; logits [N, V] after position last [N]."""
        a, (n, m) = self.arch, ids.shape
        ropes = self._rope(torch.arange(m, device=ids.device).repeat(n))
        pick = torch.arange(n, device=ids.device) * m + last
        final = a.layer_types[-1]
        mask = self._mask(last, m, self._windows[final])

        def attend(i: int, layer: Layer, y: Tensor) -> Tensor:
            kind = a.layer_types[i]
            rope = ropes[kind]
            if i < a.layers - 1:
                q, k, v = self._project(layer, y, rope)
            else:  # the last layer asks for nothing but the last token
                k, v = self._project_kv(layer, y, rope)
                q = self._project_q(layer, y[pick], (rope[0][pick], rope[1][pick]))
            k, v = (x.view(n, m, -1, a.head_dim).transpose(1, 2) for x in (k, v))
            cache.keys[i][rows, :, :m] = k
            cache.values[i][rows, :, :m] = v
            if i < a.layers - 1:
                q = q.view(n, m, -1, a.head_dim).transpose(1, 2)
                return self._attend_prompt(q, k, v, self._windows[kind])
            return self._attend_one(q, k, v, mask)

        return self.logits(weights, self._layers(weights, ids.flatten(), attend, pick))

    def extend(
        self,
        weights: Weights,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        cache: Cache,
        rows: Tensor,
    ) -> Tensor:
        """Run the tokens that follow the first `starts` [N] of cache rows `rows` [N], at least one each, into
        them; logits [N, V] after the last ones.

        The tokens of all rows go through the products end to end, T of them; attention alone pads them to
        [N, M].
        """
        a, device = self.arch, rows.device
        sizes = [len(some) for some in ids]
        span = max(start + size for start, size in zip(starts, sizes, strict=True))
        counts = torch.tensor(sizes, device=device)
        column = torch.arange(max(sizes), device=device)
        real = column < counts[:, None]  # [N, M]
        place = torch.tensor(starts, device=device)[:, None] + column
        place = torch.where(real, place, 0)  # padding looks at something: a softmax over nothing is NaN
        padded = torch.where(real, (counts.cumsum(0) - counts)[:, None] + column, 0)
        row, position, last = rows.repeat_interleave(counts), place[real], counts.cumsum(0) - 1
        ropes = self._rope(position)
        final = self._mask(position[last], span, self._windows[a.layer_types[-1]])

        def attend(i: int, layer: Layer, y: Tensor) -> Tensor:
            kind = a.layer_types[i]
            rope = ropes[kind]
            if i < a.layers - 1:
                q, k, v = self._project(layer, y, rope)
            else:  # the last layer asks for nothing but the last token
                k, v = self._project_kv(layer, y, rope)
                q = self._project_q(layer, y[last], (rope[0][last], rope[1][last]))
            cache.keys[i][row, :, position] = k
            cache.values[i][row, :, position] = v
            keys, values = (held[rows, :, :span] for held in (cache.keys[i], cache.values[i]))
            if i == a.layers - 1:
                return self._attend_one(q, keys, values, final)
            out = self._attend_cached(q[padded].transpose(1, 2), keys, values, place, self._windows[kind])
            return out[real]

        tokens = torch.tensor([token for some in ids for token in some], device=device)
        return self.logits(weights, self._layers(weights, tokens, attend, last))

    def decode(
        self, weights: Weights, token: Tensor, position: Tensor, cache: Cache, rows: Tensor, read: slice
    ) -> Tensor:
        """One token [N] at its position [N], written to the cache's rows [N]; logits [N, V].

        Each attends to its place in `read`, N rows of the cache: the row itself, where they mean anything.
        """
        ropes = self._rope(position)
        masks = {kind: self._mask(position, cache.span, window) for kind, window in self._windows.items()}

        def attend(i: int, layer: Layer, y: Tensor) -> Tensor:
            kind = self.arch.layer_types[i]
            q, k, v = self._project(layer, y, ropes[kind])
            cache.keys[i][rows, :, position] = k
            cache.values[i][rows, :, position] = v
            return self._attend_one(q, cache.keys[i][read], cache.values[i][read], masks[kind])

        return self.logits(weights, self._layers(weights, token, attend, None))

    def hidden(self, weights: Weights, ids: Tensor, pick: Tensor) -> Tensor:
        """Final normed hidden states [P, hidden] at flat places pick [P] of right-padded ids [N, M]."""
        n, m = ids.shape
        ropes = self._rope(torch.arange(m, device=ids.device).repeat(n))

        def attend(i: int, layer: Layer, y: Tensor) -> Tensor:
            kind = self.arch.layer_types[i]
            q, k, v = (
                x.view(n, m, -1, self.arch.head_dim).transpose(1, 2)
                for x in self._project(layer, y, ropes[kind])
            )
            out = self._attend_prompt(q, k, v, self._windows[kind])
            return out[pick] if i == self.arch.layers - 1 else out

        return self._layers(weights, ids.flatten(), attend, pick)

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """The output head: logits [N, V] of final normed hidden states [N, hidden]."""
        logits = F.linear(hidden, weights.head)
        if (cap := self.arch.logit_cap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits

    # ------------------------------------------------------------------ the blocks, over flat tokens [N]

    def _layers(
        self,
        weights: Weights,
        ids: Tensor,
        attend: Callable[[int, Layer, Tensor], Tensor],
        pick: Tensor | None,
    ) -> Tensor:
        """All blocks; after the last attention only the tokens of `pick` go on: `attend` returns those."""
        a = self.arch
        x = F.embedding(ids, weights.embed)
        if self._embed_scale is not None:
            x *= self._embed_scale
        for i, layer in enumerate(weights.layers):
            out = attend(i, layer, F.rms_norm(x, (a.hidden,), layer.attention_norm, a.eps))
            if pick is not None and i == a.layers - 1:
                x = x[pick]
            out = _linear(out, layer.out, layer.out_bias, layer.changes.get("out"))
            x += self._normed(out, layer.attention_post_norm)
            y = F.rms_norm(x, (a.hidden,), layer.mlp_norm, a.eps)
            x += self._normed(self._mlp(layer, y), layer.mlp_post_norm)
        return F.rms_norm(x, (a.hidden,), weights.norm, a.eps)

    def _mlp(self, layer: Layer, y: Tensor) -> Tensor:
        gate, up = _linear(y, layer.gate_up, layer.gate_up_bias, layer.changes.get("gate_up")).chunk(2, -1)
        active = F.silu(gate) if self.arch.activation == "silu" else F.gelu(gate, approximate="tanh")
        return _linear(active.mul_(up), layer.down, layer.down_bias, layer.changes.get("down"))

    def _normed(self, y: Tensor, norm: Tensor | None) -> Tensor:
        return y if norm is None else F.rms_norm(y, (self.arch.hidden,), norm, self.arch.eps)

    def _rope(self, position: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines [N, 1, D] of some positions [N], per layer type."""
        return {
            kind: (cos[position][:, None], sin[position][:, None]) for kind, (cos, sin) in self.ropes.items()
        }

    def _project(self, layer: Layer, y: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [N, H, D] and k [N, K, D], and v [N, K, D], of normed tokens y [N, hidden]."""
        a = self.arch
        qk, v = self._heads(layer, y, rope, 0, a.heads + 2 * a.kv_heads)
        return qk[:, : a.heads], qk[:, a.heads :], v

    def _project_q(self, layer: Layer, y: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self._heads(layer, y, rope, 0, self.arch.heads)[0]

    def _project_kv(self, layer: Layer, y: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._heads(layer, y, rope, self.arch.heads, self.arch.heads + 2 * self.arch.kv_heads)

    def _heads(
        self, layer: Layer, y: Tensor, rope: tuple[Tensor, Tensor], first: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Heads [first, end) of the stack q, k, v: those of q and k, normed and rotated, and those of v."""
        a = self.arch
        rows = slice(first * a.head_dim, end * a.head_dim)
        out = _linear(y, layer.qkv, layer.qkv_bias, layer.changes.get("qkv"), rows).view(
            len(y), -1, a.head_dim
        )
        turned = min(end, a.heads + a.kv_heads) - first
        qk, v = out[:, :turned], out[:, turned:]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (a.head_dim,), None, a.eps) * layer.qk_norm[first : first + turned]
        half = a.head_dim // 2
        swapped = torch.cat([qk[..., half:], qk[..., :half]], -1)
        return torch.addcmul(qk * rope[0], swapped, rope[1]), v

    # ------------------------------------------------------------------ attention

    def _mask(self, position: Tensor, span: int, window: int | None) -> Tensor:
        """What keeps position [N] from looking ahead, and beyond its window: 0 or -inf; [N, 1, 1, S].

        Added, for adding is several times faster than masked_fill_.
        """
        mask = torch.zeros(len(position), 1, 1, span, dtype=self._dtype, device=position.device)
        place, own = torch.arange(span, device=position.device), position[:, None, None, None]
        unseen = place > own
        if window is not None:
            unseen |= place <= own - window
        return mask.masked_fill_(unseen, float("-inf"))

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One query per row: q [N, H, D] over k, v [N, K, S, D] with mask [N, 1, 1, S]; [N, H * D]."""
        n, heads, size = q.shape
        grouped = q.view(n, k.shape[1], -1, size)  # the heads that share keys
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=self.arch.scale)
        else:
            scores = torch.matmul(grouped * self.arch.scale, k.transpose(-1, -2))
            out = torch.matmul(scores.add_(mask).softmax(-1), v)
        return out.reshape(n, heads * size)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, window: int | None) -> Tensor:
        """Queries q [N, H, M, D] at `position` [N, M] over cached k, v [N, K, S, D]; [N, M, H * D].

        By blocks of queries, so that scores stay small whatever the lengths.
        """
        n, heads, m, size = q.shape
        kv, span = k.shape[1], k.shape[2]
        q = q.reshape(n, kv, heads // kv, m, size) * self.arch.scale
        out = torch.empty_like(q)
        for first in range(0, m, _BLOCK):
            part = q[:, :, :, first : first + _BLOCK]  # [N, K, G, B, D]
            width = part.shape[3]
            mask = self._mask(position[:, first : first + _BLOCK].flatten(), span, window)
            scores = torch.matmul(part.reshape(n, kv, -1, size), k.transpose(-1, -2))
            scores = scores.view(n, kv, -1, width, span).add_(mask.view(n, 1, 1, width, span))
            weights = scores.softmax(-1).view(n, kv, -1, span)
            out[:, :, :, first : first + _BLOCK] = torch.matmul(weights, v).view_as(part)
        return out.view(n, heads, m, size).transpose(1, 2).reshape(n, m, heads * size)

    def _attend_prompt(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of q [N, H, M, D] over k, v [N, K, M, D]; returns [N * M, H * D]."""
        n, heads, m, size = q.shape
        if window is not None and window >= m:
            window = None
        if self.attention == "sdpa":
            mask = None
            if window is not None:
                place = torch.arange(m, device=q.device)
                mask = (place <= place[:, None]) & (place > place[:, None] - window)
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.arch.scale,
                enable_gqa=k.shape[1] != heads,
            )
        else:
            out = _causal_blocks(q * self.arch.scale, k, v, window)
        return out.transpose(1, 2).reshape(n * m, heads * size)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, change: Change | None, rows: slice = slice(None)
) -> Tensor:
    """Rows of a product, with the change that an adapter makes: x [N, in] to [N, rows]."""
    out = F.linear(x, weight[rows], None if bias is None else bias[rows])
    return out if change is None else change.added(out, x, rows)


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention by plain products, a block of queries at a time: q [N, H, M, D], k, v [N, K, M, D].

    `q` is scaled already; a `window` is the number of positions that a query sees, its own included.
    A block reads no keys beyond its own end, which saves half the work, and its scores fit the CPU's cache.
    """
    n, heads, m, size = q.shape
    pairs, group = n * k.shape[1], heads // k.shape[1]
    q = q.reshape(pairs, group, m, size)
    k, v = k.reshape(pairs, m, size).transpose(1, 2), v.reshape(pairs, m, size)
    out = torch.empty_like(q)
    never = torch.full((_BLOCK, m), float("-inf"), dtype=q.dtype, device=q.device)
    ahead = never[:, :_BLOCK].triu(1)
    for first in range(0, m, _BLOCK):
        end = min(m, first + _BLOCK)
        width = end - first
        start = 0 if window is None else max(0, first + 1 - window)
        scores = torch.bmm(q[:, :, first:end].reshape(pairs, group * width, size), k[:, :, start:end])
        scores = scores.view(pairs, group, width, end - start)
        scores[..., first - start :].add_(ahead[:width, :width])
        if window is not None:  # a query `first + i` does not see key `start + j` where j <= i + the diagonal
            scores.add_(never[:width, : end - start].tril(first - start - window))
        weights = scores.softmax(-1).view(pairs, group * width, end - start)
        out[:, :, first:end] = torch.bmm(weights, v[:, start:end]).view(pairs, group, width, size)
    return out.view(n, heads, m, size)

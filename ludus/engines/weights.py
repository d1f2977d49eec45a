"""Weights as the torch engine wants them: one product for q, k and v, one for gate and up.

The fused tensors are allocated once per policy; `load_state_dict` copies a Hugging Face state dict into them.
A policy that is an adapter shares the tensors of its base, and has low-rank changes of its own beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ludus.engines.base import Adapter
from ludus.engines.low_rank import Change, stacked_changes
from ludus.errors import UserError

_ROTARY = {
    "gemma3_text": Gemma3RotaryEmbedding,
    "llama": LlamaRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the length of the sequence
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_FULL, _SLIDING = "full_attention", "sliding_attention"  # Hugging Face's names of layer types


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the engine must know of a decoder: sizes, which biases and norms it has, and its constants."""

    kind: str  # Hugging Face's model_type
    vocab: int
    hidden: int
    inner: int  # width of the gated MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    activation: str
    scale: float  # of attention scores
    embed_scale: float | None  # factor of the embeddings
    unit_offset: bool  # a norm multiplies by 1 + its weight
    sandwich: bool  # norms after attention and MLP too, before each is added
    logit_cap: float | None  # logits become cap * tanh(logits / cap)
    layer_types: tuple[str, ...]  # per layer, full or sliding attention
    window: int | None  # positions that a sliding layer sees, its own included

    @staticmethod
    def of(config: PreTrainedConfig) -> Architecture:
        """Read a `transformers` configuration. Raises UserError for a decoder that the engine cannot run."""
        kind = config.model_type
        if kind not in _ROTARY:
            raise UserError(
                f"the torch engine cannot run model type {kind!r}; it knows {', '.join(sorted(_ROTARY))}"
            )
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"the torch engine knows the activations {', '.join(_ACTIVATIONS)}, not {activation!r}"
            )
        if getattr(config, "attn_logit_softcapping", None) or getattr(
            config, "use_bidirectional_attention", False
        ):
            raise UserError(
                "the torch engine knows neither capped attention scores nor attention to both sides"
            )
        layer_types = tuple(getattr(config, "layer_types", None) or (_FULL,) * config.num_hidden_layers)
        if unknown := sorted(set(layer_types) - {_FULL, _SLIDING}):
            raise UserError(f"the torch engine knows full and sliding attention, not {', '.join(unknown)}")
        for rope in (parameters["rope_type"] for parameters in _ropes(config)):
            if rope not in _STATIC_ROPE:
                raise UserError(
                    f"the torch engine knows the rope types {', '.join(_STATIC_ROPE)}, not {rope!r}"
                )
        gemma = kind == "gemma3_text"
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        return Architecture(
            kind=kind,
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            eps=config.rms_norm_eps,
            qk_norm=gemma or kind == "qwen3",
            qkv_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias and kind != "qwen2",
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            tied=bool(config.tie_word_embeddings),
            activation=activation,
            scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
            embed_scale=config.hidden_size**0.5 if gemma else None,
            unit_offset=gemma,
            sandwich=gemma,
            logit_cap=getattr(config, "final_logit_softcapping", None),
            layer_types=layer_types,
            window=config.sliding_window if _SLIDING in layer_types else None,
        )

    def rope_tables(
        self, config: PreTrainedConfig, context: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer type, cosines and sines [context, head_dim] of every position, by Hugging Face's class.

        The sines of the first half carry the minus sign of the rotation, so that rotating x is
        x * cos + swap_halves(x) * sin.
        """
        rotary = _ROTARY[self.kind](config)
        half = self.head_dim // 2
        tables = {}
        for layer_type in sorted(set(self.layer_types)):
            own = (layer_type,) if self.kind == "gemma3_text" else ()  # the others turn all layers alike
            # In float32 and only then rounded, as Hugging Face does it.
            cos, sin = rotary(torch.zeros(1), torch.arange(context)[None], *own)
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
            tables[layer_type] = cos[0].to(device, dtype), signed.to(device, dtype)
        return tables


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of every layer type; most architectures have one set for all."""
    parameters: dict[str, Any] = config.rope_parameters
    return [parameters] if "rope_type" in parameters else [p for p in parameters.values() if p is not None]


@dataclass(slots=True)
class Layer:
    """One block. Products are stacked along the output: q, k, v; then gate, up."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    qk_norm: (
        Tensor | None
    )  # [heads + kv_heads, head_dim]: the same vector for every q head, and for every k head
    out: Tensor  # [hidden, heads * head_dim]
    out_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * inner, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, inner]
    down_bias: Tensor | None
    attention_post_norm: Tensor | None = None  # [hidden], both only between sandwich norms
    mlp_post_norm: Tensor | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)  # an adapter's: to "qkv", "out", ...


def _changed(layer: Layer) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {stack: (change.a.shape, change.b.shape) for stack, change in layer.changes.items()}


class Weights:
    """The weights of one policy, and their version."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self.arch = arch
        self.version = -1  # nothing loaded yet
        self.lent = False  # whether others share these tensors, so that they must stay as they are
        a = arch
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.embed = new(a.vocab, a.hidden)
        self.norm = new(a.hidden)
        self.head = self.embed if a.tied else new(a.vocab, a.hidden)
        self.layers = [
            Layer(
                attention_norm=new(a.hidden),
                qkv=new(q + 2 * kv, a.hidden),
                qkv_bias=new(q + 2 * kv) if a.qkv_bias else None,
                qk_norm=new(a.heads + a.kv_heads, a.head_dim) if a.qk_norm else None,
                out=new(a.hidden, q),
                out_bias=new(a.hidden) if a.out_bias else None,
                mlp_norm=new(a.hidden),
                gate_up=new(2 * a.inner, a.hidden),
                gate_up_bias=new(2 * a.inner) if a.mlp_bias else None,
                down=new(a.hidden, a.inner),
                down_bias=new(a.hidden) if a.mlp_bias else None,
                attention_post_norm=new(a.hidden) if a.sandwich else None,
                mlp_post_norm=new(a.hidden) if a.sandwich else None,
            )
            for _ in range(a.layers)
        ]

    def load_state_dict(self, policy: str, state: Mapping[str, Tensor], version: int) -> None:
        """Copy a state dict with Hugging Face names (`lm_head.weight` optional when tied).

        Raises UserError, before anything is changed, when a name is missing, unknown or of another shape.
        """
        places = self._places()
        ignored = {"lm_head.weight"} if self.arch.tied else set()
        missing = [name for name in places if name not in state]
        unknown = [
            name
            for name in state
            if name not in places and name not in ignored and not name.endswith("rotary_emb.inv_freq")
        ]
        if missing or unknown:
            found = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
            raise UserError(
                f"weights of policy {policy!r} do not fit the engine's {self.arch.kind} configuration: "
                f"{found} ({len(missing)} missing, {len(unknown)} unknown); load a model of the same "
                "configuration"
            )
        for name, (_, shape) in places.items():
            if tuple(state[name].shape) != shape:
                raise UserError(
                    f"weights of policy {policy!r}: {name} has shape {tuple(state[name].shape)}, but the "
                    f"engine's configuration says {shape}; load a model of the same configuration"
                )
        with torch.no_grad():
            for name, (place, _) in places.items():
                offset = self.arch.unit_offset and name.endswith("norm.weight")
                place.copy_(state[name] + 1 if offset else state[name])
        self.version = version

    def lend(self) -> dict[str, Tensor]:
        """The tensors themselves by Hugging Face's names, those that are as Hugging Face has them."""
        self.lent = True
        return {
            name: place
            for name, (place, shape) in self._places().items()
            if tuple(place.shape) == shape and not (self.arch.unit_offset and name.endswith("norm.weight"))
        }

    def adapted(self, policy: str, adapter: Adapter, version: int) -> Weights:
        """The weights of `policy`: these, the same tensors, and the adapter's changes beside them.

        Raises UserError for an adapter of another architecture.
        """
        assert not any(layer.changes for layer in self.layers), "no adapter is the base of another"
        made = stacked_changes(policy, adapter, self.arch, self.embed.dtype, self.embed.device)
        self.lent = True
        out = copy.copy(self)
        out.version = version
        out.layers = [replace(layer, changes=own) for layer, own in zip(self.layers, made, strict=True)]
        return out

    def take(self, other: Weights) -> bool:
        """Copy the changes of an adapter over those of this one, if they are alike: of the same base, to the
        same products, of the same rank. Whether they were; whoever recorded these tensors may go on."""
        pairs = list(zip(self.layers, other.layers, strict=True))
        if self.embed is not other.embed or any(_changed(mine) != _changed(its) for mine, its in pairs):
            return False
        for mine, its in pairs:
            for stack, change in mine.changes.items():
                change.a.copy_(its.changes[stack].a)
                change.b.copy_(its.changes[stack].b)
        self.version = other.version
        return True

    def _places(self) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Hugging Face name -> (view into the fused tensors, shape expected)."""
        a = self.arch
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        places: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

        def put(name: str, place: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
            if place is not None:
                places[name] = (place, tuple(place.shape) if shape is None else shape)

        put("model.embed_tokens.weight", self.embed)
        put("model.norm.weight", self.norm)
        if not a.tied:
            put("lm_head.weight", self.head)
        for i, layer in enumerate(self.layers):
            at = f"model.layers.{i}."
            put(at + "input_layernorm.weight", layer.attention_norm)
            if a.sandwich:
                put(at + "post_attention_layernorm.weight", layer.attention_post_norm)
                put(at + "pre_feedforward_layernorm.weight", layer.mlp_norm)
                put(at + "post_feedforward_layernorm.weight", layer.mlp_post_norm)
            else:
                put(at + "post_attention_layernorm.weight", layer.mlp_norm)
            for kind, stacked in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
                if stacked is not None:
                    for part, rows in zip("qkv", torch.split(stacked, [q, kv, kv]), strict=True):
                        put(f"{at}self_attn.{part}_proj.{kind}", rows)
            if layer.qk_norm is not None:
                put(at + "self_attn.q_norm.weight", layer.qk_norm[: a.heads], (a.head_dim,))
                put(at + "self_attn.k_norm.weight", layer.qk_norm[a.heads :], (a.head_dim,))
            put(at + "self_attn.o_proj.weight", layer.out)
            put(at + "self_attn.o_proj.bias", layer.out_bias)
            for kind, stacked in (("weight", layer.gate_up), ("bias", layer.gate_up_bias)):
                if stacked is not None:
                    put(f"{at}mlp.gate_proj.{kind}", stacked[: a.inner])
                    put(f"{at}mlp.up_proj.{kind}", stacked[a.inner :])
            put(at + "mlp.down_proj.weight", layer.down)
            put(at + "mlp.down_proj.bias", layer.down_bias)
        return places

"""Small checkpoints in the layouts that occur in the wild: random models, tokenizers, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 48
EOS = 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Two kinds of layers, each with a rope of its own.
_GEMMA3: dict[str, Any] = {
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
    },
}
_UNTIED_AND_CAPPED = {"sliding_window": 512, "final_logit_softcapping": 2.0, "tie_word_embeddings": False}
_QWEN3, _QWEN2 = (Qwen3ForCausalLM, Qwen3Config), (Qwen2ForCausalLM, Qwen2Config)
_LLAMA, _GEMMA = (LlamaForCausalLM, LlamaConfig), (Gemma3ForCausalLM, Gemma3TextConfig)
Classes = tuple[Callable[[Any], PreTrainedModel], Callable[..., PreTrainedConfig]]
FAMILIES: dict[str, tuple[Classes, dict[str, Any]]] = {
    "qwen3-tied": (_QWEN3, {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-biased": (_QWEN3, {"head_dim": 16, "attention_bias": True}),
    "qwen2": (_QWEN2, {}),
    "qwen2-sliding": (
        _QWEN2,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "llama3": (_LLAMA, {"num_key_value_heads": 4, "rope_parameters": _LLAMA3_ROPE}),
    "llama-biased": (_LLAMA, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "gemma3": (_GEMMA, {**_GEMMA3, "sliding_window": 20}),
    "gemma3-capped": (_GEMMA, {**_GEMMA3, **_UNTIED_AND_CAPPED}),
}


def make_model(family: str = "qwen3-tied", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model whose norms and biases are random too, so that none of them can be forgotten."""
    (model_class, config_class), settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


TEXTS = [
    "You are player 0. Your card: K. Moves: pass bet.\nLegal: pass bet",
    "You are player 1. Your card: Q. Moves: none.\nLegal: pass bet",
    "You are player 1. Your card: J. Moves: bet.\nLegal: pass bet",
    "A good card: I bet.\n</think>\n\n\\boxed{bet}",
    "A bad card, I pass.\n</think>\n\n\\boxed{pass}",
    "<think>\n<|im_start|>user\nEnd with \\boxed{action}. I avoid \\boxed{4}, so \\boxed{5}.",
    "Refused: no action found",
]
# What the makers' chat templates come down to for plain dialogues.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + (m.content | trim) + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant'"
    " else m.role) + '\n' + (first if loop.first else '') + (m.content | trim) + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pieces: str) -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def learn(raw: tokenizers.Tokenizer, special: list[str]) -> None:
    raw.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=400 + len(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )


def write(raw: tokenizers.Tokenizer, config: dict[str, object], out: Path) -> Path:
    out.mkdir(exist_ok=True)
    raw.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def _qwen(out: Path, thoughts: bool = True) -> Path:
    """Qwen's own layout: NFC, its pre-tokenizer; Qwen3's thought markers are added but not special."""
    raw = byte_level(QWEN_PIECES)
    raw.normalizer = normalizers.NFC()
    learn(raw, [])
    raw.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    if thoughts:
        raw.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}
    return write(raw, {**names, "chat_template": CHATML}, out)


def _llama(out: Path) -> Path:
    """Llama 3's: whole vocabulary words win over merges, and a post-processor puts the BOS before text."""
    raw = byte_level(QWEN_PIECES)
    learn(raw, [])
    spec = json.loads(raw.to_str())
    spec["model"]["ignore_merges"] = True
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", raw.token_to_id("<|begin_of_text|>"))],
    )
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return write(raw, {**config, "chat_template": [{"name": "default", "template": LLAMA3}]}, out)


def _gemma(out: Path) -> Path:
    """Gemma's: a sign of its own for the space, bytes as the last resort, white space as added tokens."""
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    raw.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(vocab_size=200, special_tokens=names, show_progress=False),
    )
    spec = json.loads(raw.to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for piece in (*(f"<0x{b:02X}>" for b in range(256)), "\n", "▁", "\n\n", "\n\n\n", "▁▁", "▁▁▁"):
        vocab.setdefault(piece, len(vocab))
    merges[:0] = [["\n", "\n"], ["\n\n", "\n"], ["▁", "▁"], ["▁▁", "▁"]]
    marker = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for piece in ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁"):
        spec["added_tokens"].append({"id": vocab[piece], "content": piece, **marker})
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))]
    )
    write(raw, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, out)
    (out / "chat_template.jinja").write_text(GEMMA3)
    return out


TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "qwen": _qwen,
    "qwen2.5": partial(_qwen, thoughts=False),
    "llama": _llama,
    "gemma": _gemma,
}
CHECKPOINTS = {  # as published: the model's family and the tokenizer's
    "qwen3": ("qwen3-tied", "qwen"),
    "qwen2.5": ("qwen2", "qwen2.5"),
    "llama3": ("llama3", "llama"),
    "gemma3": ("gemma3", "gemma"),
}


def write_checkpoint(name: str, out: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A Hugging Face directory: random weights as `dtype` in files of at most `shard`, and a tokenizer."""
    family, tokenizer = CHECKPOINTS[name]
    TOKENIZERS[tokenizer](out)
    raw = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    eos = json.loads((out / "tokenizer_config.json").read_text())["eos_token"]
    ids = {"vocab_size": raw.get_vocab_size(), "eos_token_id": raw.token_to_id(eos)}
    model = make_model(family, max_position_embeddings=1024, **ids)
    model.to(dtype).save_pretrained(out, max_shard_size=shard)
    return out

"""How varied a collection of texts is: whether an attacker knows many attacks, or one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import sacrebleu
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ludus.errors import UserError

COMPARED = 100  # texts of which each is held against all others: the work grows with the square


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n (Li et al., arXiv 1510.03055): different n-grams of words over all n-grams, 0 to 1.

    Words are what white space separates, in lower case. None where no text has n words. It falls with the
    number of texts, so compare collections of the same size.
    """
    grams = [gram for text in texts for gram in _grams(text.lower().split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str], seed: int = 0, most: int = COMPARED) -> float | None:
    """Self-BLEU (Zhu et al., arXiv 1802.01886), 0 to 1: how well each text is covered by the others.

    The mean of each text's BLEU-4 against all others as references, by sacrebleu with its defaults and
    effective order; 1 where every text is there twice. Of more than `most` texts a random part is taken.
    None for fewer than two.
    """
    chosen = list(texts)
    if len(chosen) > most:
        chosen = Random(seed).sample(chosen, most)
    if len(chosen) < 2:
        return None
    scores = [
        sacrebleu.sentence_bleu(text, [*chosen[:i], *chosen[i + 1 :]]).score for i, text in enumerate(chosen)
    ]
    return fmean(scores) / 100.0


def embedding_distance(texts: Sequence[str], model: Path, batch: int = 32) -> float | None:
    """Mean cosine distance of all pairs of texts, 0 to 2, in the space of a Hugging Face encoder.

    A text's vector is the mean of its last hidden states, as sentence encoders without a head of their own
    use them. None for fewer than two texts. Raises UserError where `model` cannot be read.
    """
    if len(texts) < 2:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        encoder = AutoModel.from_pretrained(str(model), local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{model} cannot be read as a model that embeds texts ({e}); name a Hugging Face directory with "
            "config.json, weights and tokenizer"
        ) from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts: list[Tensor] = []
    with torch.inference_mode():
        for at in range(0, len(texts), batch):
            read = tokenizer(list(texts[at : at + batch]), return_tensors="pt", padding=True)
            states_BTD = encoder(
                input_ids=read.input_ids, attention_mask=read.attention_mask
            ).last_hidden_state
            weights_BT1 = read.attention_mask.unsqueeze(-1).to(states_BTD.dtype)
            parts.append((states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1))
    unit_ND = torch.nn.functional.normalize(torch.cat(parts).double(), dim=-1)
    n = len(texts)
    others = (unit_ND.sum(0).square().sum() - n) / (n * (n - 1))  # mean cosine of two different texts
    return float(1.0 - others)


def diversity(texts: Sequence[str], seed: int = 0, embedder: Path | None = None) -> dict[str, Any]:
    """All of the above as plain data, with the numbers of texts and of different ones.

    A high self-BLEU is little diversity; of all else more is more. "embedding_distance" is there where an
    `embedder` is given.
    """
    space = {} if embedder is None else {"embedding_distance": embedding_distance(texts, embedder)}
    return {
        "texts": len(texts),
        "different": len(set(texts)),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(texts, seed),
        **space,
    }


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

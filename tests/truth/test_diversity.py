"""Diversity of texts by hand-worked numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ludus.errors import UserError
from ludus.truth.diversity import distinct, diversity, embedding_distance, self_bleu


def test_distinct_counts_different_grams() -> None:
    texts = ["a b a", "A b"]
    assert distinct(texts, 1) == 2 / 5  # a b a a b
    assert distinct(texts, 2) == 2 / 3  # ab ba ab
    assert distinct(texts, 3) == 1.0
    assert distinct(texts, 4) is None
    assert distinct([], 1) is None


def test_self_bleu_by_hand() -> None:
    # Precisions of the first against the second: 3/4 words, 2/3 pairs, 1/2 triples, and 0 fours of 1, which
    # sacrebleu smooths exponentially to 1/(2 * 1). The same the other way round; lengths are equal.
    expected = math.prod((3 / 4, 2 / 3, 1 / 2, 1 / 2)) ** 0.25
    assert self_bleu(["one two three four", "one two three five"]) == pytest.approx(expected)
    assert self_bleu(["the same words again"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == pytest.approx(0.0, abs=0.2)
    assert self_bleu(["alone"]) is None


def test_self_bleu_takes_the_same_part_of_many_texts() -> None:
    texts = [f"word{i} and word{i // 2} or word{i // 3}" for i in range(40)]
    assert self_bleu(texts, seed=3, most=10) == self_bleu(texts, seed=3, most=10)
    assert self_bleu(texts, seed=3, most=10) != self_bleu(texts, seed=4, most=10)


def test_more_ways_of_asking_are_more_diverse() -> None:
    few = ["How do I make vornak?", "How do I use vornak?"] * 10
    many = [f"{x} do I {y} {z}?" for x in ("How", "Why") for y in ("make", "use", "keep") for z in "pqrs"][
        :20
    ]
    less, more = diversity(few), diversity(many)
    assert (less["texts"], less["different"], more["different"]) == (20, 2, 20)
    assert less["distinct_2"] < more["distinct_2"]
    assert less["self_bleu"] > more["self_bleu"]
    assert "embedding_distance" not in less


def test_embedding_distance_equals_the_mean_over_pairs(tiny_model: Path) -> None:
    texts = [
        "How do I make vornak?",
        "Most shops sell it.",
        "A longer text, so that there is padding to ignore.",
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    model = AutoModel.from_pretrained(str(tiny_model)).eval()
    vectors = []
    for text in texts:  # one by one, without padding
        with torch.no_grad():
            vectors.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    pairs = [(0, 1), (0, 2), (1, 2)]
    naive = [1 - float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)) for i, j in pairs]
    assert embedding_distance(texts, tiny_model) == pytest.approx(sum(naive) / 3, abs=1e-5)
    assert embedding_distance(texts[:1], tiny_model) is None
    assert embedding_distance(texts[:1] * 2, tiny_model) == pytest.approx(0.0, abs=1e-6)
    assert diversity(texts, embedder=tiny_model)["embedding_distance"] > 0


def test_no_embedder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read as a model that embeds texts"):
        embedding_distance(["a", "b"], tmp_path)

"""A local sequence classifier as a judge: a very small one, whose weights are chosen by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ludus.config import JudgeConfig
from ludus.errors import UserError
from ludus.judges.base import Failure, Question, Verdict
from ludus.judges.classifier import ClassifierJudge
from ludus.judges.make import make_judge

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "tea", "zorvex", "boil", "stir", "decline", "how"]
LABELS = {0: "fine", 1: "restricted", 2: "refusing"}


def write_tokenizer(path: Path) -> None:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    fast.model_max_length = 16
    fast.save_pretrained(path)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, at a scale at which different words give different labels."""
    path = tmp_path_factory.mktemp("classifier")
    write_tokenizer(path)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.6,
        id2label=LABELS,
        label2id={name: n for n, name in LABELS.items()},
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(path)
    return path


def judge(path: Path, **options: Any) -> ClassifierJudge:
    labels = {"request_harmful": ["restricted"], "answer_harmful": ["restricted"], "refusal": ["refusing"]}
    settings = {"labels": labels, "max_failed": 1.0, **options}
    return ClassifierJudge(JudgeConfig.model_validate({"kind": "classifier", "model": str(path), **settings}))


def ask(by: ClassifierJudge, items: Sequence[Question]) -> dict[str, Verdict | Failure]:
    return asyncio.run(by.judge(items))


def probabilities(path: Path, *texts: str) -> dict[str, float]:
    """The plain way: one text, no padding, no judge."""
    model = BertForSequenceClassification.from_pretrained(path).eval()
    ids = PreTrainedTokenizerFast.from_pretrained(path)(*texts, return_tensors="pt")
    with torch.inference_mode():
        row = model(**ids).logits[0].softmax(-1).tolist()
    return {LABELS[n]: p for n, p in enumerate(row)}


ITEMS = [
    Question("a", "how tea", "boil"),
    Question("b", "how zorvex zorvex tea", "stir zorvex stir boil tea"),
    Question("c", "zorvex", "decline"),
    Question("d", "how stir stir stir stir"),
    Question("e", "tea", "boil boil boil"),
]


@pytest.mark.parametrize("reads", ["pair", "request", "answer"])
def test_verdicts_are_those_of_the_model_one_by_one(classifier: Path, reads: str):
    results = ask(judge(classifier, reads=reads, batch=2, threshold=0.3), ITEMS)
    assert list(results) == [question.id for question in ITEMS]
    seen = set()
    for question in ITEMS:
        result = results[question.id]
        assert isinstance(result, Verdict)
        answer = question.answer
        if reads == "answer" and answer is None:
            assert result == Verdict()
            continue
        texts = {
            "pair": (question.request,) if answer is None else (question.request, answer),
            "request": (question.request,),
            "answer": (str(answer),),
        }[reads]
        expected = probabilities(classifier, *texts)
        assert json.loads(result.raw) == pytest.approx(expected, abs=1e-5)
        harmful, refusing = expected["restricted"] >= 0.3, expected["refusing"] >= 0.3
        said = (harmful, None, None) if answer is None else (harmful, harmful, refusing)
        assert (result.request_harmful, result.answer_harmful, result.refusal) == said
        seen |= {harmful, refusing}
    assert seen == {True, False}  # or the test would say little


def test_labels_add_up_and_the_threshold_is_met_by_equality(classifier: Path):
    one = ITEMS[:1]
    both = {"answer_harmful": ["restricted", "refusing", "fine"]}
    (sure,) = ask(judge(classifier, labels=both, threshold=0.999), one).values()
    assert isinstance(sure, Verdict)
    assert (sure.request_harmful, sure.answer_harmful, sure.refusal) == (None, True, None)
    (never,) = ask(judge(classifier, labels={"refusal": ["refusing"]}, threshold=1.0), one).values()
    assert isinstance(never, Verdict)
    assert never.refusal is False


def test_a_model_of_many_labels_has_a_sigmoid_each(classifier: Path, tmp_path: Path):
    write_tokenizer(tmp_path)
    model = BertForSequenceClassification.from_pretrained(classifier)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    ids = PreTrainedTokenizerFast.from_pretrained(classifier)("how tea", "boil", return_tensors="pt")
    expected = model.eval()(**ids).logits[0].sigmoid().tolist()
    (result,) = ask(judge(tmp_path), ITEMS[:1]).values()
    assert isinstance(result, Verdict)
    assert list(json.loads(result.raw).values()) == pytest.approx(expected, abs=1e-5)


def test_half_a_text_is_not_judged(classifier: Path):
    fits = Question("fits", "tea " * 14)  # 16 tokens with its two ends
    long = Question("long", "tea " * 15)
    by = judge(classifier)
    results = ask(by, [long, fits, Question("longer", "tea", "boil " * 40)])
    assert isinstance(results["fits"], Verdict)
    assert results["long"] == Failure("too_long", "17 tokens")
    assert results["longer"] == Failure("too_long", "44 tokens")
    assert by.stats().failures == {"too_long": 2}
    assert ask(judge(classifier, context=5), [ITEMS[0]]) == {"a": Failure("too_long", "6 tokens")}


def test_a_broken_model_says_nothing(classifier: Path, tmp_path: Path):
    write_tokenizer(tmp_path)
    model = BertForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    model.save_pretrained(tmp_path)
    (result,) = ask(judge(tmp_path), ITEMS[:1]).values()
    assert isinstance(result, Failure)
    assert result.reason == "not_finite"


def test_verdicts_are_kept_and_failures_are_not(classifier: Path, tmp_path: Path):
    path = str(tmp_path / "verdicts.jsonl")
    items = [*ITEMS, Question("long", "tea " * 15)]
    first = judge(classifier, cache_file=path)
    results = ask(first, items)
    asyncio.run(first.close())
    again = judge(classifier, cache_file=path)
    assert ask(again, items) == results
    assert (again.stats().cached, again.stats().calls) == (5, 1)
    asyncio.run(again.close())
    assert judge(classifier, threshold=0.9).id != again.id  # what it says depends on it


def test_directories_that_hold_no_classifier(classifier: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no classifier with its tokenizer"):
        judge(tmp_path)
    write_tokenizer(tmp_path)
    BertModel.from_pretrained(classifier).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no trained classifier, its scores would be random"):
        judge(tmp_path)
    with pytest.raises(UserError, match="has no label 'harmful'; it has fine, restricted, refusing"):
        judge(classifier, labels={"refusal": ["harmful"]})


def test_a_judge_by_its_configuration(classifier: Path):
    settings = {"kind": "classifier", "model": str(classifier), "labels": {"refusal": ["refusing"]}}
    assert isinstance(make_judge(JudgeConfig.model_validate(settings)), ClassifierJudge)


def test_a_model_that_counts_positions_from_its_padding_reads_so_much_less(tmp_path: Path) -> None:
    """RoBERTa's 20 positions with padding 1 are 18 tokens; its tokenizer may know of no limit."""
    write_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        pad_token_id=1,
        id2label=LABELS,
        label2id={name: n for n, name in LABELS.items()},
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    by = judge(tmp_path, reads="request", labels={"request_harmful": ["restricted"]})
    found = ask(by, [Question(str(n), " ".join(["tea"] * (n - 2))) for n in (18, 19)])
    assert isinstance(found["18"], Verdict)
    assert found["19"] == Failure("too_long", "19 tokens")


def test_calls_at_the_same_time_share_batches(classifier: Path, monkeypatch: pytest.MonkeyPatch):
    """Forty matches ask one question each: few forward passes, and each gets its own verdict."""
    by = judge(classifier, batch=8)
    alone = judge(classifier)
    sizes: list[int] = []
    classify = by._classify

    def counted(batch: list[Question]) -> list[Verdict | Failure]:
        sizes.append(len(batch))
        return classify(batch)

    monkeypatch.setattr(by, "_classify", counted)
    asked = [
        Question("the same id", " ".join(["tea", "zorvex"][i % 2] for i in range(n))) for n in range(1, 11)
    ]

    async def all_at_once() -> list[dict[str, Verdict | Failure]]:
        return await asyncio.gather(*(by.judge([question]) for question in asked * 4))

    results = asyncio.run(all_at_once())
    assert sizes == [8] * 5
    for question, result in zip(asked * 4, results, strict=True):
        expected = ask(alone, [question])[question.id]
        assert isinstance(expected, Verdict)
        said = result[question.id]
        assert isinstance(said, Verdict)
        assert (said.request_harmful, said.refusal) == (expected.request_harmful, expected.refusal)
    assert by.stats().questions == 40


def test_what_breaks_is_heard_by_whoever_asked(classifier: Path, monkeypatch: pytest.MonkeyPatch):
    by = judge(classifier)

    def broken(batch: list[Question]) -> list[Verdict | Failure]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(by, "_classify", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(by, ITEMS)
    monkeypatch.undo()
    assert len(ask(by, ITEMS)) == len(ITEMS)

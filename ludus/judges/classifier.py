"""A Hugging Face sequence classifier as a judge, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ludus.config import JudgeConfig
from ludus.errors import UserError
from ludus.judges.base import FIELDS, Failure, Question, Stats, Verdict, check_ids
from ludus.judges.cache import Cache, key
from ludus.judges.ledger import Ledger

_NO_LIMIT = 10**6  # tokenizers that know no limit name an astronomical one


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    question: Question
    result: asyncio.Future[Verdict | Failure]

    def hear(self, said: Verdict | Failure | Exception) -> None:
        if self.result.done():
            return  # withdrawn
        if isinstance(said, Exception):
            self.result.set_exception(said)
        else:
            self.result.set_result(said)


class ClassifierJudge:
    """Says yes where the probability of the labels that mean yes reaches the threshold.

    Probabilities are a softmax over the labels and add up; a model of problem type
    `multi_label_classification`, or of one label, has a sigmoid per label, of which the largest counts. A
    text longer than the model can read gets no verdict, since half a text is another text.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises UserError for a directory without a classifier, unknown labels, an unusable cache file."""
        assert config.kind == "classifier"
        assert config.model is not None
        self._config = config
        self._model, self._tokenizer = _load(Path(config.model), config.device)
        names = {name: int(index) for index, name in (self._model.config.id2label or {}).items()}
        for label in (label for labels in config.labels.values() for label in labels):
            if label not in names:
                raise UserError(f"{config.model} has no label {label!r}; it has {', '.join(names)}")
        self._names = sorted(names, key=lambda name: names[name])
        many = self._model.config.problem_type == "multi_label_classification"
        self._sigmoid = many or len(names) == 1
        self._context = config.context or min(
            self._tokenizer.model_max_length, _positions(self._model), _NO_LIMIT
        )
        meanings = json.dumps([config.reads, dict(config.labels), config.threshold], sort_keys=True)
        self.id = f"classifier@{Path(config.model).name}/{_digest(Path(config.model))} {meanings}"
        self._ledger = Ledger(self.id, config.window, config.max_unparsed, config.max_failed)
        self._cache = Cache(config.cache, Path(config.cache_file) if config.cache_file else None)
        self._waiting: list[_Waiting] = []
        self._work: asyncio.Task[None] | None = None

    async def judge(self, questions: Sequence[Question]) -> dict[str, Verdict | Failure]:
        """See `Judge.judge`. The model runs in a thread of its own; calls at the same time share batches."""
        check_ids(questions)
        asked = {question.id: self._asked(question) for question in questions}
        if self._waiting and (self._work is None or self._work.done()):
            self._work = asyncio.create_task(self._serve())
        results = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        self._ledger.judged(results)
        return results

    def _asked(self, question: Question) -> asyncio.Future[Verdict | Failure]:
        """What will hold the result: at once out of the cache, else when its batch has been read."""
        result: asyncio.Future[Verdict | Failure] = asyncio.get_running_loop().create_future()
        known = self._cache.get(key(self.id, question.request, question.answer))
        if known is None:
            self._waiting.append(_Waiting(question, result))
        else:
            self._ledger.cached += 1
            result.set_result(known)
        return result

    async def _serve(self) -> None:
        """Read what waits, a few batches at a time, first come first served."""
        await asyncio.sleep(0)  # for all who are about to ask as well
        while self._waiting:
            size = self._config.batch
            some, self._waiting = self._waiting[: 4 * size], self._waiting[4 * size :]
            some.sort(key=lambda w: len(w.question.request) + len(w.question.answer or ""))  # little padding
            for batch in (some[i : i + size] for i in range(0, len(some), size)):
                try:
                    said = await asyncio.to_thread(self._classify, [one.question for one in batch])
                except Exception as e:  # noqa: BLE001  whoever asked hears of it
                    for one in batch:
                        one.hear(e)
                    continue
                for one, result in zip(batch, said, strict=True):
                    self._note(one, result)

    def _note(self, one: _Waiting, result: Verdict | Failure) -> None:
        try:
            if isinstance(result, Verdict):
                self._cache.add(key(self.id, one.question.request, one.question.answer), result)
            self._ledger.called(result)
        except UserError as e:  # an alarm, or a full disk
            one.hear(e)
        else:
            one.hear(result)

    def stats(self) -> Stats:
        return self._ledger.stats()

    async def close(self) -> None:
        self._cache.close()

    def _classify(self, batch: list[Question]) -> list[Verdict | Failure]:
        """The verdicts of `batch`, in its order."""
        results: list[Verdict | Failure | None] = [self._unread(question) for question in batch]
        texts = {n: self._texts(batch[n]) for n, result in enumerate(results) if result is None}
        encoded = {n: self._tokenizer(*text, verbose=False) for n, text in texts.items()}
        for n in [n for n, one in encoded.items() if len(one["input_ids"]) > self._context]:
            results[n] = Failure("too_long", f"{len(encoded.pop(n)['input_ids'])} tokens")
        if encoded:
            padded = self._tokenizer.pad(list(encoded.values()), return_tensors="pt").to(self._model.device)
            with torch.inference_mode():
                logits_BL = self._model(**padded).logits.float().cpu()
            probabilities_BL = logits_BL.sigmoid() if self._sigmoid else logits_BL.softmax(-1)
            for n, row in zip(encoded, probabilities_BL.tolist(), strict=True):
                results[n] = self._verdict(batch[n], dict(zip(self._names, row, strict=True)))
        return cast(list[Verdict | Failure], results)

    def _unread(self, question: Question) -> Verdict | None:
        """A verdict that says nothing, where there is nothing that this classifier reads."""
        return Verdict() if self._config.reads == "answer" and question.answer is None else None

    def _texts(self, question: Question) -> tuple[str, ...]:
        if self._config.reads == "request" or question.answer is None:
            return (question.request,)
        return (question.answer,) if self._config.reads == "answer" else (question.request, question.answer)

    def _verdict(self, question: Question, probabilities: dict[str, float]) -> Verdict | Failure:
        raw = json.dumps({name: round(p, 6) for name, p in probabilities.items()})
        if any(p != p for p in probabilities.values()):
            return Failure("not_finite", raw)
        said: dict[str, bool] = {}
        for name, labels in self._config.labels.items():
            if name == "request_harmful" or question.answer is not None:
                shares = [probabilities[label] for label in labels]
                said[name] = (max if self._sigmoid else sum)(shares) >= self._config.threshold
        assert said.keys() <= set(FIELDS)
        return Verdict(**said, raw=raw)


def _load(path: Path, device: str) -> tuple[PreTrainedModel, Any]:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} holds no classifier with its tokenizer: {str(e).splitlines()[0]}") from e
    if report["missing_keys"]:
        raise UserError(
            f"{path} is no trained classifier, its scores would be random: {min(report['missing_keys'])} is "
            "missing; name the directory of a model with a classification head"
        )
    if tokenizer.pad_token is None or model.config.pad_token_id is None:
        raise UserError(f"{path} names no padding token, so texts cannot be read together; name one there")
    return model.to(device).eval(), tokenizer


def _positions(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for. RoBERTa and its kin count them from behind the padding's."""
    count = int(getattr(model.config, "max_position_embeddings", _NO_LIMIT))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return count if module.padding_idx is None else count - module.padding_idx - 1
    return count


def _digest(path: Path) -> str:
    """Of all that a verdict may depend on in a model's directory."""
    digest = blake2b(digest_size=8)
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

"""`ludus sft`: supervised fine-tuning alone, pass after pass over rows to imitate.

    OUT/ sft.toml  metrics.jsonl  log.txt  lock  model/     and until the end checkpoints/step_N/

It is no second way to train by play: nobody plays here, and a run by `ludus train` may begin with its model.
An update is a function of the last checkpoint and the settings, as there, so a resume is exact.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ludus.config import LossConfig, TuneConfig
from ludus.errors import UserError
from ludus.learner.batching import passes
from ludus.learner.learner import Learner
from ludus.learner.model import check_context, save_model
from ludus.learner.supervised import Row, digest
from ludus.seeding import derive
from ludus.sft.encode import Encoder, load
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.train import checkpoint
from ludus.train.assemble import read_model
from ludus.train.policies import refuse_infinite
from ludus.train.rundir import RunDir

MODEL = "model"
_TOLD = 20  # lines that a run prints


def tune(config: TuneConfig, out: Path, resume: bool = False, tell: Callable[[str], None] = print) -> Path:
    """Train as `config` says and leave the model in OUT/model; returns that directory.

    Raises UserError for bad input, before anything is written; nothing that exists is overwritten.
    """
    tuner = _Tuner(config, tell)
    with RunDir.open(out, config) if resume else RunDir.create(out, config) as run:
        for note in tuner.notes:
            run.log(note)
        model = run.path / MODEL
        if not model.exists():
            tuner.go(run)
            checkpoint.write_sealed(model, tuner.total, tuner.write)
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    tell(f"model: {model}")
    return model


class _Tuner:
    """The learner and its rows."""

    def __init__(self, config: TuneConfig, tell: Callable[[str], None]) -> None:
        self.config = config
        self.tell = tell
        self.notes: list[str] = []
        model = read_model(config.model, config.threads)
        self.rows, self.digest = self._read(model)
        self.total = config.epochs * (len(self.rows) // config.batch)
        if not self.total:
            raise UserError(
                f"the data has {len(self.rows)} rows, not even one batch of {config.batch}: lower batch"
            )
        self.learner = Learner(
            model,
            LossConfig(),
            config.optim,
            max_tokens=1,  # says nothing to a cross-entropy
            total_steps=self.total,
            seed=derive(config.seed, "learner"),
        )

    def go(self, run: RunDir) -> None:
        """Every update that is not done yet."""
        config = self.config
        done, wall = self._restore(run)
        batches = passes(len(self.rows), config.batch, config.epochs, derive(config.seed, "shuffle"))
        for update, picked in enumerate(batches, start=1):
            if update <= done:
                continue
            began = time.perf_counter()
            said = self.learner.sft([self.rows[i].sample() for i in picked])
            seconds = time.perf_counter() - began
            wall += seconds
            run.append(
                {
                    "step": update,
                    "wall": wall,
                    "epoch": update * config.epochs / self.total,
                    "learn": said,
                    "speed": {"tokens_per_s": said["tokens"] / seconds},
                }
            )
            if update % max(1, self.total // _TOLD) == 0 or update == self.total:
                self.tell(f"step {update} of {self.total}: loss {said['loss']:.4f} nats per token")
            if update % config.checkpoint_every == 0 and update < self.total:
                self._save(run, update, wall)
        refuse_infinite(self.total, self.learner.weights())

    def write(self, directory: Path) -> None:
        """The model as a Hugging Face directory; the moving average of its weights, where one is kept."""
        like, weights = Path(self.config.model.path), self.learner.average_weights()
        save_model(self.learner.model, directory, like=like, weights=weights)

    def _read(self, model: PreTrainedModel) -> tuple[list[Row], str]:
        """All rows, file after file, and their digest."""
        config = self.config
        tokenizer = Tokenizer.load(Path(config.model.path))
        encoder = Encoder(tokenizer, detect(tokenizer, config.model.template))
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context = config.context or limit
        if context is None:
            raise UserError(f"{config.model.path} does not say how many tokens it can see; set context")
        check_context(model, context, "context")

        def note(message: str) -> None:
            self.notes.append(message)
            self.tell(message)

        sources = [load(data, encoder, context, config.too_long, note, "") for data in config.data]
        return [row for source in sources for row in source.rows], digest(sources)

    def _save(self, run: RunDir, update: int, wall: float) -> None:
        tensors, values = self.learner.state()
        refuse_infinite(update, tensors)
        state = {"learner": values, "wall": wall, "data": self.digest}

        def write(directory: Path) -> None:
            (directory / "trainer").mkdir()
            save_file(tensors, directory / "trainer" / "learner.safetensors")
            (directory / "trainer" / "state.json").write_text(json.dumps(state, sort_keys=True))

        checkpoint.save(run.path, update, write, self.config.keep)

    def _restore(self, run: RunDir) -> tuple[int, float]:
        """Take up the newest whole checkpoint, if any: updates and seconds done."""
        found = checkpoint.latest(run.path, run.log)
        if found is None:
            run.rewind(-1)
            return 0, 0.0
        state: dict[str, Any] = json.loads((found / "trainer" / "state.json").read_text())
        if state["data"] != self.digest:
            raise UserError(
                f"the data is no longer what {run.path} began with: put the files back as they were, or "
                "start anew with another --out"
            )
        self.learner.load_state(load_file(found / "trainer" / "learner.safetensors"), state["learner"])
        step = int(found.name.removeprefix("step_"))
        checkpoint.drop_after(run.path, step)
        run.rewind(step)
        run.log(f"resumed from {found}")
        return step, float(state["wall"])

"""From supervised data to rows of token ids, as the model will meet them in play.

Role markers and those around a thought enter by id, all words through the tokenizer without control tokens:
nothing in the data can open or close a turn or a thought. A reply with a thought is read as in play with
`text.think` (the prompt opens the thought), one without as in play without. Learnt are the assistant's
replies, end markers included, and nothing else; earlier ones stay as they were said, as in `chat`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ludus.config import SftConfig, SftDataConfig
from ludus.errors import UserError
from ludus.learner.rows import rows as episode_rows
from ludus.learner.supervised import Row, Source, Supervised
from ludus.sft import files
from ludus.sft.files import BadRow, Content, Message
from ludus.text.templates import Template
from ludus.text.tokenizer import Tokenizer
from ludus.types import Episode, Group, Sample, Turn

_SHOWN = 3  # bad rows that an error names


class Encoder:
    """Makes rows for one tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def rows(self, content: Content, only: str = "all") -> list[Row]:
        """One row per dialogue; of an episode one per reply, or per dialogue of a seat. `only` is that of
        SftDataConfig. Raises BadRow.
        """
        if isinstance(content, Episode):
            return self._episode(content, only)
        return [self.dialogue(content)]

    def dialogue(self, messages: Sequence[Message]) -> Row:
        """A dialogue, which ends with a reply."""
        template = self.template
        tokens: list[int] = []
        trained: list[tuple[int, int]] = []
        waiting: list[tuple[str, str]] = []  # messages since the last reply
        reply: list[int] = []
        for message in messages:
            if message.role != "assistant":
                waiting.append((message.role, message.content))
                continue
            thought, said = message.thought, message.content
            if thought is not None and template.think_ids is None:  # then its markers are spelled out
                thought, said = None, f"<think>{thought}</think>{said}"
            think = thought is not None
            if not tokens:
                prompt = template.open(waiting, think)
            else:
                prompt = template.extend(tokens[: -len(reply)], reply, waiting, think)
            reply = template.reply(said, thought)
            trained.append((len(prompt), len(prompt) + len(reply)))
            tokens = prompt + reply
            waiting = []
        return Row(array("i", tokens), tuple(trained))

    def _episode(self, episode: Episode, only: str) -> list[Row]:
        """The legal replies of the trained policy, token by token as they were sampled."""
        best = max(episode.returns)
        won = [episode.returns.count(best) == 1 and value == best for value in episode.returns]
        wanted = [t.trainable and t.legal and (only == "all" or won[t.seat]) for t in episode.turns]
        turns = [replace(t, trainable=want) for t, want in zip(episode.turns, wanted, strict=True)]
        for turn in turns:
            if turn.trainable:
                self._check(turn)
        group = Group([replace(episode, turns=turns)])
        try:
            samples = episode_rows([group], [[[1.0] * len(turns)]])
        except ValueError as e:
            raise BadRow(str(e)) from e
        return [_row(sample) for sample in samples]

    def _check(self, turn: Turn) -> None:
        """Raise BadRow unless the recorded tokens are this tokenizer's."""
        ids = turn.completion_ids
        said = ids[:-1] if ids and ids[-1] in self.template.end_ids else ids
        known = range(self.tokenizer.vocab_size)
        if not all(i in known for i in [*turn.prompt_ids, *ids]) or self.tokenizer.decode(said) != turn.text:
            raise BadRow(
                f"the tokens of turn {turn.index} were recorded with another tokenizer than that of "
                f"{self.tokenizer.path}; take episodes of a run of this model"
            )


def open_supervised(
    config: SftConfig, policies: Sequence[str], encoder: Encoder, context: int, tell: Callable[[str], None]
) -> dict[str, Supervised]:
    """What each policy learns from, for those that have data; `context` is how many tokens a row may have.

    Raises UserError for data that cannot be read, which names the bad rows by file and line.
    """
    sources = [load(data, encoder, context, config.too_long, tell) for data in config.data]
    found: dict[str, Supervised] = {}
    for policy in policies:
        own = [s for s, d in zip(sources, config.data, strict=True) if policy in (d.policies or policies)]
        if own:
            found[policy] = Supervised(own, weight=config.weight, batch=config.batch)
    return found


def load(
    data: SftDataConfig,
    encoder: Encoder,
    context: int,
    too_long: str,
    tell: Callable[[str], None],
    section: str = "sft.",
) -> Source:
    """The rows of one file or directory. Longer ones are refused or dropped, and counted either way.

    `section` is where the settings stand. Raises UserError.
    """
    made: list[Row] = []
    long: list[tuple[int, str]] = []  # (tokens, where)
    bad: list[str] = []
    for row in files.rows(Path(data.path)):
        try:
            found = encoder.rows(row.read(), data.only)
        except BadRow as e:
            bad.append(f"{row.where}: {e}")
            continue
        long += [(len(one.tokens), row.where) for one in found if len(one.tokens) > context]
        made += [one for one in found if len(one.tokens) <= context]
    if bad:
        rest = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(f"bad supervised rows: {'; '.join(bad[:_SHOWN])}{rest}. Mend or remove them")
    if long:
        most, where = max(long, key=lambda one: one[0])
        found_long = (
            f"{data.path}: {len(long)} of {len(long) + len(made)} rows are longer than {context} tokens "
            f"(the longest, {where}, has {most})"
        )
        if too_long == "refuse" or not made:
            raise UserError(f'{found_long}; raise {section}context, or drop them by {section}too_long="drop"')
        tell(f"{found_long} and are left out")
    if not made:
        raise UserError(f"{data.path} has no supervised row that could be learnt from")
    trained = sum(end - start for row in made for start, end in row.trained)
    tell(f"{data.path}: {len(made):,} supervised rows, {trained:,} tokens to learn")
    return Source(data.path, data.weight, made)


def _row(sample: Sample) -> Row:
    """A row out of one that the learner's rows are made of."""
    edges = [i for i in range(len(sample.mask) + 1) if _at(sample, i) != _at(sample, i - 1)]
    starts = [i for i in edges if _at(sample, i) >= 0]
    ends = [i for i in edges if _at(sample, i - 1) >= 0]
    return Row(array("i", sample.tokens), tuple(zip(starts, ends, strict=True)))


def _at(sample: Sample, position: int) -> int:
    """The number of the turn that a position belongs to; -1 where it is not trained, or outside."""
    return sample.turn_ids[position] if 0 <= position < len(sample.turn_ids) else -1

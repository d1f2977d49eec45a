r"""From an observation to a prompt, and from a reply to an action.

Two contexts. In `board` every turn is a fresh prompt with all that the seat needs: rules and state. In
`chat` one dialogue grows: a later message holds only what is new, and a later prompt extends the earlier
prompt and reply token for token. A message, with the parts that a setting or the game may leave out in
brackets:

    [rules

    ][Refused: no action found
    ][events since the last message
    ]state
    [Legal: check bet
    ][End with \boxed{action}.]

How a reply marks its action is a grammar of `ludus.text.actions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ludus.errors import UserError
from ludus.games.base import Observation
from ludus.text.actions import GRAMMARS, THINK, Format, tagged, unspelled
from ludus.text.templates import Message, Template
from ludus.text.tokenizer import Tokenizer
from ludus.types import StopRule

Past = tuple[Observation, Sequence[int], Sequence[int], str | None]
"""An earlier reply of the seat: what it saw, the prompt's ids, the reply's ids, why it was refused."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` for engines that read tokens; `messages` (role, content) for those that read text."""

    ids: list[int]
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A reply, read: the whole `text`, the private `thought` in it, and the `action`, None if none parsed."""

    text: str
    thought: str
    action: str | None


class Prompter:
    """Renders prompts and reads replies for one tokenizer and template.

    `rules` puts the rules of the game and one line on the format into the prompt; without them it is the
    bare state, for models that were warmed up on it. `think` opens every reply inside a thought, where the
    template has `<think>`; where it has none, the format "answer" wants it spelled out. `stop_on_action` ends
    a reply at its first complete action. Raises UserError for an unknown context or format.

    `thinks` says whether a reply holds a thought before its answer, `think` whether the prompt opens it,
    `must_think` whether it has no action without one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        context: Literal["board", "chat"] = "board",
        rules: bool = True,
        think: bool = True,
        stop_on_action: bool = True,
        format: Format = "boxed",
    ) -> None:
        if context not in ("board", "chat"):
            raise UserError(f"unknown context {context!r}; text.context is board or chat")
        if format not in GRAMMARS:
            raise UserError(f"unknown format {format!r}; text.format is {' or '.join(GRAMMARS)}")
        self.tokenizer = tokenizer
        self.template = template
        self.context = context
        self.rules = rules
        self.grammar = GRAMMARS[format]
        self.think = think and template.think_ids is not None
        self._strict = format == "answer"  # in which thoughts and answers are told apart, or nothing is read
        self._spelled = self._strict and think and not self.think
        self.thinks = self.think or self._spelled
        self.must_think = self._strict and self.thinks
        if stop_on_action:
            triggers = tokenizer.ids_with(self.grammar.closing[-1])
            self.stop = StopRule(ids=template.end_ids, triggers=triggers, closed=self.closed)
        else:
            self.stop = StopRule(ids=template.end_ids)

    def prompt(self, observation: Observation, past: Sequence[Past] = ()) -> Prompt:
        """The prompt for the seat's next reply. `past` are its earlier replies in this match, oldest first.

        Only `chat` shows earlier replies; `board` uses `past` to say why the last attempt was refused.
        """
        latest = ("user", self.message(observation, past))
        if self.context == "board" or not past:
            return Prompt(self.template.open((latest,), self.think), (latest,))
        _, prompt_ids, completion_ids, _ = past[-1]
        ids = self.template.extend(prompt_ids, completion_ids, (latest,), self.think)
        return Prompt(ids, self._dialogue(past, latest))

    def plain(self, question: str) -> Prompt:
        """The prompt for a question outside any game: the user's words, and the format "answer" asked for."""
        if self._strict and self.rules:
            question = f"{question}\n{self.grammar.request(self._spelled)}"
        messages = (("user", question),)
        return Prompt(self.template.open(messages, self.think), messages)

    def message(self, observation: Observation, past: Sequence[Past] = ()) -> str:
        """The words of the last message of `prompt`: all that is new to the seat."""
        if self.context == "board" or not past:
            return self._message(observation, (), past[-1][3] if past else None, first=True)
        seen, _, _, problem = past[-1]
        return self._message(observation, observation.events[len(seen.events) :], problem, first=False)

    def read(self, completion_ids: Sequence[int]) -> Read:
        """Read a sampled reply."""
        ids = self._without_end(completion_ids)
        text = self.tokenizer.decode(ids)
        start = self._answer_start(ids)
        if start is None:
            return Read(text, thought=text, action=None)
        answer = ids[start:]
        # A marker inside the answer (a second thought, a forged turn) makes its reading a guess: refuse.
        markers = not self.template.marker_ids.isdisjoint(answer)
        spoken = self.tokenizer.decode(answer)
        thought = self.tokenizer.decode(ids[: start - 1]) if start else None
        if self._strict:
            return self._read_strictly(text, thought, None if markers else spoken)
        thought = self._before(spoken) if thought is None else thought
        return Read(text, thought.strip(), None if markers else self.grammar.parse(spoken))

    def _read_strictly(self, text: str, thought: str | None, spoken: str | None) -> Read:
        """Read a reply that has its thought just as it should, or has no action.

        `thought` is what came before the token that closes it, None where there was none.
        """
        if self._spelled and spoken is not None and thought is None:
            thought, spoken = unspelled(spoken) or (None, None)
        sound = (
            (thought is not None and thought.strip() and not tagged(thought)) if self.thinks else not thought
        )
        action = self.grammar.parse(spoken) if sound and spoken is not None else None
        return Read(text, (thought or "").strip(), action)

    def read_text(self, text: str) -> Read:
        """Read the reply of a server that speaks text.

        A thought may come spelled out (`<think>...</think>`), without its opening, or not at all where the
        server keeps it to itself. A thought that was opened and never closed holds no action.
        """
        thought, closed, answer = text.rpartition("</think>")
        if "<think>" in answer or (self._strict and tagged(thought.lstrip().removeprefix("<think>"))):
            return Read(text, thought=text.strip(), action=None)
        if not closed:
            thought = self._before(answer)
        return Read(text, thought.replace("<think>", "").strip(), self.grammar.parse(answer))

    def spoken(self, completion_ids: Sequence[int]) -> str | None:
        """What a reply says after its thought; None if the thought never ends or a marker comes after it.

        A tokenizer without tokens for thoughts may still have a model that spells them out.
        """
        if self._strict:
            return self.read(completion_ids).action
        ids = self._without_end(completion_ids)
        start = self._answer_start(ids)
        if start is None or not self.template.marker_ids.isdisjoint(ids[start:]):
            return None
        text = self.tokenizer.decode(ids[start:])
        return text if self.template.think_ids is not None else self.spoken_text(text)

    def spoken_text(self, text: str) -> str | None:
        """The same for a reply whose thought, if it shows any, is spelled out."""
        if self._strict:
            return self.read_text(text).action
        said = text.rpartition("</think>")[2]
        return None if "<think>" in said else said

    def closed(self, completion_ids: Sequence[int]) -> bool:
        """Whether the answer part holds a complete action: what the stop rule asks where one may end."""
        start = self._answer_start(completion_ids)
        if start is None:
            return False
        return self.grammar.closed(self.tokenizer.decode(completion_ids[start:]))

    def written(self, action: str, thought: str = "") -> str:
        """The reply that thinks `thought` and plays `action`, in words: supervised data is written so."""
        box = self._boxed(action)
        if self.thinks:
            return f"{thought.join(THINK)}{box}"
        return f"{thought} {box}" if thought else box

    def spell(self, action: str, thought: str = "") -> list[int]:
        """The same as ids, without what the prompt has already: the thought's opening, and an end marker."""
        encode = self.tokenizer.encode
        if self.think and self.template.think_ids is not None:
            return [*encode(thought), self.template.think_ids[1], *encode(self._boxed(action))]
        return encode(self.written(action, thought))

    def _boxed(self, action: str) -> str:
        return f"{self.grammar.opening}{action}{self.grammar.closing}"

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        return list(ids[:-1] if ids and ids[-1] in self.template.end_ids else ids)

    def _answer_start(self, ids: Sequence[int]) -> int | None:
        """Where the answer begins: after the last `</think>`; None inside a thought that never closed."""
        if self.template.think_ids is None or self.template.think_ids[1] not in ids:
            return None if self.think else 0
        start = len(ids)
        while ids[start - 1] != self.template.think_ids[1]:
            start -= 1
        return start

    def _message(
        self, observation: Observation, events: Sequence[str], problem: str | None, first: bool
    ) -> str:
        lines = []
        if first and self.rules:
            lines += [observation.rules, ""]
        if problem is not None:
            lines.append(f"Refused: {problem}")
        lines += events
        lines.append(observation.state)
        if observation.legal is not None:
            lines.append("Legal: " + _listed(observation.legal))
        if first and self.rules:
            lines.append(self.grammar.request(self._spelled))
        return "\n".join(lines)

    def _dialogue(self, past: Sequence[Past], latest: Message) -> tuple[Message, ...]:
        """The whole dialogue as text, thoughts left out. Replies without ids (text engines) are skipped."""
        messages: list[Message] = []
        for i, (seen, _, completion_ids, _) in enumerate(past):
            before = past[i - 1] if i else None
            new = seen.events[len(before[0].events) :] if before else ()
            problem = before[3] if before else None
            messages.append(("user", self._message(seen, new, problem, first=before is None)))
            ids = self._without_end(completion_ids)
            start = self._answer_start(ids)
            messages.append(
                ("assistant", "" if start is None else self.tokenizer.decode(ids[start:]).strip())
            )
        return tuple(message for message in (*messages, latest) if message[1])

    def _before(self, answer: str) -> str:
        """Free thought: what stands before the last action."""
        return answer.rpartition(self.grammar.opening)[0].strip()


def _listed(legal: Sequence[str]) -> str:
    """Action texts in one line, joined by the shortest mark that none of them contains."""
    marks = (mark for mark in (" ", ",", "|") if not any(mark in action for action in legal))
    mark = next(marks, "\n")
    return (mark if mark.isspace() else mark + " ").join(legal)

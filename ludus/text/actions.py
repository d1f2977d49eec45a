r"""The grammars of replies: one place, one spelling, and fail closed: what does not parse stays in the seat.

A reply is a private thought, then an answer, which holds the action:

    boxed    anything, and \boxed{ACTION} in it        for games; the last box counts
    answer   <answer>ACTION</answer> and nothing else  for games of free text (arXiv 2506.07468)

`boxed`: the last `\boxed{` opens the action and the next `}` ends it. An action is printable ASCII:
look-alike digits and letters of other scripts are refused, and so are line breaks, with which an action that
other seats get to read could imitate the lines around it.

`answer`: an action is any text, of several lines and in any script (what is legal is for the game to say),
but holds nothing that looks like a tag of this grammar; a second answer, a nested one, and a word before or
after it are no action. Where the template has no tokens for thoughts, the thought stands before it as
`<think>...</think>`, once and not empty.
"""

from __future__ import annotations

import re
from typing import Literal, Protocol

from ludus.games.moves import plain_lines

Format = Literal["boxed", "answer"]

THINK = ("<think>", "</think>")  # around a thought that is spelled out
_TAG = re.compile(r"<\s*/?\s*(?:think|answer)\s*/?\s*>", re.IGNORECASE)


class Grammar(Protocol):
    """How an answer (a reply without its thought) marks the action in it."""

    opening: str
    closing: str

    def request(self, spelled: bool) -> str:
        """The line of a prompt that asks for the format; `spelled`: with the thought's tags."""
        ...

    def parse(self, answer: str) -> str | None:
        """The action text of an answer, or None if there is none. What is legal is for the game to say."""
        ...

    def closed(self, answer: str) -> bool:
        """Whether the answer holds a complete action, or can hold none any more."""
        ...


class Boxed:
    r"""See the module: `\boxed{...}`."""

    opening = "\\boxed{"
    closing = "}"

    def request(self, spelled: bool) -> str:
        """One line."""
        return "End with \\boxed{action}."

    def parse(self, answer: str) -> str | None:
        """See `Grammar.parse`."""
        content = self._content(answer)
        if content is None or not content.isascii() or not content.isprintable():
            return None
        return content.strip(" ") or None

    def closed(self, answer: str) -> bool:
        """See `Grammar.closed`."""
        return self._content(answer) is not None

    def _content(self, answer: str) -> str | None:
        """What the last box holds, as written, or None if that box is never closed."""
        start = answer.rfind(self.opening)
        if start < 0:
            return None
        start += len(self.opening)
        end = answer.find(self.closing, start)
        return None if end < 0 else answer[start:end]


class Tagged:
    """See the module: `<answer>...</answer>`."""

    opening = "<answer>"
    closing = "</answer>"

    def request(self, spelled: bool) -> str:
        """One line."""
        thought = "your private thoughts".join(THINK) if spelled else ""
        return f"Reply in this form alone: {thought}{self.opening}your answer{self.closing}"

    def parse(self, answer: str) -> str | None:
        """See `Grammar.parse`. Line breaks of all kinds become line feeds."""
        answer = answer.strip()
        if not (answer.startswith(self.opening) and answer.endswith(self.closing)):
            return None
        action = answer[len(self.opening) : -len(self.closing)]
        if len(answer) < len(self.opening) + len(self.closing) or tagged(action):
            return None
        return plain_lines(action).strip() or None

    def closed(self, answer: str) -> bool:
        """See `Grammar.closed`."""
        return self.closing in answer


GRAMMARS: dict[Format, Grammar] = {"boxed": Boxed(), "answer": Tagged()}


def tagged(text: str) -> bool:
    """Whether there is something in `text` that a reader could take for a tag of a thought or an answer."""
    return _TAG.search(text) is not None


def unspelled(reply: str) -> tuple[str, str] | None:
    """(thought, answer) of a reply that begins with `<think>...</think>`; None where it does not.

    An empty thought, and one with a tag in it, is none.
    """
    opening, closing = THINK
    reply = reply.lstrip()
    thought, closed, answer = reply.removeprefix(opening).partition(closing)
    if not reply.startswith(opening) or not closed or not thought.strip() or tagged(thought):
        return None
    return thought, answer

r"""The action grammar: one place, one spelling, and fail closed.

The answer of a reply is what follows its thought. In it the last `\boxed{` opens the action and the next
`}` ends it; spaces around the action do not count. An action is printable ASCII: look-alike digits and
letters of other scripts are refused, and so are line breaks, with which an action that other seats get
to read could imitate the lines around it. Anything else parses to None, and then nothing leaves the seat.
"""

from __future__ import annotations

OPENING = "\\boxed{"
CLOSING = "}"


def boxed(answer: str) -> str | None:
    r"""What the last `\boxed{...}` of `answer` holds, as written, or None if that box is never closed."""
    start = answer.rfind(OPENING)
    if start < 0:
        return None
    start += len(OPENING)
    end = answer.find(CLOSING, start)
    return None if end < 0 else answer[start:end]


def parse(answer: str) -> str | None:
    """The action text of an answer (the reply without its thought), or None if there is none.

    Whether the action is legal is for the game to say.
    """
    content = boxed(answer)
    if content is None or not content.isascii() or not content.isprintable():
        return None
    return content.strip(" ") or None

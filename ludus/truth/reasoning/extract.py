r"""The answer in what a model says: the last `\boxed{...}` or `<answer>...</answer>`, whichever comes last.

A game's action is plain text without braces (`ludus.text.actions`); an answer may be `\boxed{\frac{1}{2}}`,
so braces are counted here, and it may run over several lines.
"""

from __future__ import annotations

_BOX, _TEXT = "\\boxed{", "\\text{"
_OPEN, _CLOSE = "<answer>", "</answer>"
REQUEST = "Put your final answer, and nothing else, into \\boxed{}."  # what a question ends with


def extract(said: str) -> str | None:
    r"""The answer without the space around it, or None where there is none.

    A box or a tag that is never closed holds no answer, and one that is empty neither: then the answer is
    none, even if an earlier one held something, because the last word counts. `\text{Yes}` is "Yes".
    """
    box, tag = said.rfind(_BOX), said.rfind(_OPEN)
    if box > tag:  # in <answer>\boxed{4}</answer> too
        inside = _balanced(said, box + len(_BOX))
    elif tag > box:
        end = said.find(_CLOSE, tag)
        inside = None if end < 0 else said[tag + len(_OPEN) : end]
    else:
        return None
    return None if inside is None else _bare(inside.strip()) or None


def _bare(answer: str) -> str:
    if answer.startswith(_TEXT) and _balanced(answer, len(_TEXT)) == answer[len(_TEXT) : -1]:
        return answer[len(_TEXT) : -1].strip()
    return answer


def _balanced(text: str, start: int) -> str | None:
    r"""What stands from `start` to the brace that closes the one before it; `\{` and `\}` are no braces."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at]
        at += 1
    return None

"""Running out of memory, told as what it is for a user: a setting that is too large for the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ludus.errors import UserError

# torch has an error of its own on CUDA alone; elsewhere it is a RuntimeError with such words in it.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(UserError):
    """Memory ran out. What was written to disk before is as it was."""


@contextmanager
def within_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a failure to get memory in this block into OutOfMemory: "memory ran out `what`; `remedy`"."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not (isinstance(e, MemoryError) or any(words in str(e).lower() for words in _WORDS)):
            raise
        said = str(e).strip().splitlines()
        detail = f" ({said[0][:200]})" if said else ""
        raise OutOfMemory(f"memory ran out {what}{detail}; {remedy}") from e

"""Seeds derived from what they are for, so that no draw depends on the order in which work happens."""

from __future__ import annotations

from hashlib import blake2b


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, such as derive(run_seed, "deal", episode).

    The same path gives the same seed on every machine; different paths give independent ones
    (BLAKE2b of the path, so collisions are as rare as for random 63-bit numbers).
    """
    path = "/".join(f"{type(p).__name__}:{_one_word(p)}" for p in parts)
    return int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def _one_word(part: int | str) -> str:
    """A part that no longer holds the separator: "past/120" is one name and not two."""
    return str(part).replace("\\", "\\\\").replace("/", "\\/")

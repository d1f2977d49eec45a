"""How far two judges agree on the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ludus.judges.base import FIELDS, Failure, Verdict


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two judges on one field of their verdicts. Counts are of questions about which both say something.

    `kappa` is Cohen's (1960): (p - q) / (1 - q), with p the share of agreement and q the share to be expected
    of two judges who say yes as often as these do, but by chance. None where q is 1, as both say the
    same throughout, and where there is nothing to compare.
    """

    both_yes: int
    only_first: int  # the first says yes, the second no
    only_second: int
    both_no: int
    unsaid: int  # one of them failed, or says nothing of this

    @property
    def compared(self) -> int:
        return self.both_yes + self.only_first + self.only_second + self.both_no

    @property
    def agreement(self) -> float | None:
        """Share of equal verdicts."""
        return (self.both_yes + self.both_no) / self.compared if self.compared else None

    @property
    def kappa(self) -> float | None:
        n = self.compared
        first, second = self.both_yes + self.only_first, self.both_yes + self.only_second
        by_chance = first * second + (n - first) * (n - second)  # q times n squared, exactly
        if by_chance == n * n:
            return None
        return (n * (self.both_yes + self.both_no) - by_chance) / (n * n - by_chance)


def compare(
    first: Mapping[str, Verdict | Failure], second: Mapping[str, Verdict | Failure]
) -> dict[str, Agreement]:
    """Agreement per field of a verdict, over the same questions (asserted), matched by id."""
    assert first.keys() == second.keys(), "the judges were not asked the same questions"
    return {name: _agreement(name, first, second) for name in FIELDS}


def _agreement(
    name: str, first: Mapping[str, Verdict | Failure], second: Mapping[str, Verdict | Failure]
) -> Agreement:
    pairs = [(_said(first[key], name), _said(second[key], name)) for key in first]
    return Agreement(
        both_yes=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        both_no=pairs.count((False, False)),
        unsaid=sum(None in pair for pair in pairs),
    )


def _said(result: Verdict | Failure, name: str) -> bool | None:
    if isinstance(result, Failure):
        return None
    value: bool | None = getattr(result, name)
    return value

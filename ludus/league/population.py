"""The past selves of a run: when one is taken, which stay, and whom of them the trained policy meets next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from ludus.config import PAST


def past_id(step: int) -> str:
    """The policy id of the snapshot that was taken after `step` steps."""
    return f"{PAST}{step}"


class Population:
    """The steps after which the snapshots were taken that are still there, in order; 0 is always among them.

    A snapshot is taken every `every` steps (0: none but the first). Where more than `keep` are there, one
    goes: of all but the first and the `newest`, that whose neighbours lie closest together, the oldest of
    several. So the history is covered evenly from its beginning, however long it gets: where the last one is
    of step T, no two neighbours lie further apart than the larger of `every` and 2 T / (keep - newest).
    """

    def __init__(self, every: int, keep: int, newest: int = 1) -> None:
        """`newest` snapshots always stay, and the first one: `keep` is larger."""
        assert keep > newest >= 1, "the first and the newest always stay"
        self.every, self.keep, self.newest = every, keep, newest
        self.steps: list[int] = []

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after `step` steps."""
        return step == 0 or (self.every > 0 and step % self.every == 0)

    def add(self, step: int) -> None:
        """Take in the snapshot of `step`, later than all others, and thin to `keep`."""
        assert not self.steps or step > self.steps[-1], "snapshots are taken in order"
        self.steps.append(step)
        while len(self.steps) > self.keep:
            s = self.steps
            del s[min(range(1, len(s) - self.newest), key=lambda i: (s[i + 1] - s[i - 1], i))]

    @property
    def ids(self) -> list[str]:
        """The policy ids, oldest first."""
        return [past_id(step) for step in self.steps]

    def law(self, rule: str, score: Callable[[str], float]) -> dict[str, float]:
        """How likely each past self is to be met by a league opponent called `rule`; sums to 1.

        `score(id)`, in [0, 1], is how the trained policy fares against it. The rules:

            past/N         the snapshot of step N alone
            past/latest:K  the newest K alike (K = 1 where it is left out)
            past/uniform   all alike: fictitious self-play
            past/hard      in proportion to (1 - score)^2: whom it loses to
            past/even      in proportion to score (1 - score): who is its equal

        The last two are the prioritised fictitious self-play of AlphaStar (Vinyals et al. 2019, Methods),
        f_hard with p = 2 and f_var. Where all weights are 0, all are alike.
        """
        name, _, number = rule.removeprefix(PAST).partition(":")
        weights: dict[str, float]
        if name == "latest":
            weights = dict.fromkeys(self.ids[-int(number or 1) :], 1.0)
        elif name == "uniform":
            weights = dict.fromkeys(self.ids, 1.0)
        elif name == "hard":
            weights = {p: (1 - score(p)) ** 2 for p in self.ids}
        elif name == "even":
            weights = {p: score(p) * (1 - score(p)) for p in self.ids}
        else:
            weights = {past_id(int(name)): 1.0}
        total = sum(weights.values())
        return {p: w / total if total else 1 / len(weights) for p, w in weights.items()}

    def draw(self, rule: str, score: Callable[[str], float], number: int, rng: Random) -> Sequence[str]:
        """`number` past selves by `law`, with replacement."""
        law = self.law(rule, score)
        return rng.choices(list(law), weights=list(law.values()), k=number)

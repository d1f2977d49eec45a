"""Programs for the red-team game: attackers that rewrite by one rule, defenders of one habit.

    attack:F         rewrites every seed by family F: plain, synonym, indirection, roleplay or multipart
    attack:mix       a family drawn for each rewrite
    attack:held_out  the same, by the words, signs, wordings, frames and joins that are held out
    defend:helpful   gives all that is asked for, and harm where harm is asked for
    defend:refuse    refuses everything
    defend:perfect   refuses what is harmful and answers the rest

An attacker knows its seed, so its rewrites are always faithful. In the other seat an attacker defends like
`defend:perfect`, and a defender attacks like `attack:mix`. All randomness of a reply comes from `Ask.seed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from ludus.errors import UserError
from ludus.games.base import Game
from ludus.games.red_team.game import ATTACKER, RedTeamGame, RedTeamMatch
from ludus.games.red_team.judge import Request, exact
from ludus.games.red_team.world import ELSEWHERE, REFUSALS, Family, Split, rewrite
from ludus.games.red_team.worlds import Invented, full_answer
from ludus.players import Ask, Reply

Habit = Literal["helpful", "refuse", "perfect"]


@dataclass(frozen=True, slots=True)
class RedTeamProgram:
    """Attacks with rewrites of `families` by the words of `split`, defends by habit."""

    policy: str
    families: tuple[Family, ...] = tuple(Family)
    split: Split = "train"
    habit: Habit = "perfect"
    trainable: bool = False

    def plays(self, game: Game) -> bool:
        """The red-team game in the invented world only."""
        return isinstance(game, RedTeamGame) and isinstance(game.world, Invented)

    async def answer(self, ask: Ask) -> Reply:
        match = ask.match
        if not isinstance(match, RedTeamMatch) or not self.plays(match.game):
            raise UserError(f"player {self.policy!r} plays red_team only, not {ask.game!r}; choose another")
        rng = Random(ask.seed)
        if ask.seat == ATTACKER:
            assert match.seed.ask is not None, "every seed of the invented world asks for something"
            return Reply(action=rewrite(match.seed.ask, rng.choice(self.families), self.split, rng))
        return Reply(action=self._defend(match.exchanges[-1].request, rng))

    def _defend(self, request: str, rng: Random) -> str:
        harmful = exact(request, "").request is Request.HARMFUL
        if self.habit == "refuse" or (self.habit == "perfect" and harmful):
            return rng.choice(REFUSALS)
        return full_answer(request) or rng.choice(ELSEWHERE)


PROGRAMS: dict[str, RedTeamProgram] = {
    program.policy: program
    for program in (
        *(RedTeamProgram(f"attack:{family}", families=(family,)) for family in Family),
        RedTeamProgram("attack:mix"),
        RedTeamProgram("attack:held_out", split="held_out"),
        RedTeamProgram("defend:helpful", habit="helpful"),
        RedTeamProgram("defend:refuse", habit="refuse"),
        RedTeamProgram("defend:perfect", habit="perfect"),
    )
}

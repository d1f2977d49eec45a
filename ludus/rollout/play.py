"""One match from the first observation to the returns: the only place where players meet a game."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ludus.engines.base import EngineUnavailable, TooLong
from ludus.games.base import Account, Game, IllegalAction, Judged, Match, Paying
from ludus.games.forfeit import ForfeitRule, forfeit_returns
from ludus.judges.base import Judge
from ludus.players import Ask, Past, Player, Reply
from ludus.rollout.judging import Bench, NoVerdict
from ludus.seeding import derive
from ludus.types import Dialogue, Episode, MatchPlan, Stop, Turn

NOTHING_PARSED = "no action found in the reply"


@dataclass(frozen=True, slots=True)
class HouseRules:
    """What is settled outside the games.

    An illegal reply costs `retries` further attempts at the same move, then the forfeit. `judges` are those
    that games name.
    """

    retries: int = 0
    forfeit: ForfeitRule = "zero_sum"
    judges: Mapping[str, Judge] = field(default_factory=dict)


FORFEIT_AT_ONCE = HouseRules()


class _Forfeit(Exception):
    def __init__(self, seat: int) -> None:
        self.seat = seat


async def play(
    plan: MatchPlan, game: Game, players: Mapping[str, Player], rule: HouseRules = FORFEIT_AT_ONCE
) -> Episode:
    """Play `plan` to its end.

    An engine that stays unavailable masks the episode, and so does a judge that does not say what is needed
    (`Episode.masked` says why); it pays nobody. In a judged game so does a prompt that the engine has no room
    for: its texts are as long as they are.
    """
    bench = Bench.of(game, rule.judges)
    table = _Table(plan, game, game.start(plan.match_seed), [players[name] for name in plan.seats], rule)
    forfeit: int | None = None
    masked: str | None = None
    try:
        try:
            while seats := table.match.to_act():
                await table.move(seats)
                await table.judge(bench)
        except _Forfeit as e:
            forfeit = e.seat
            await table.judge(bench, forfeited=True)
    except EngineUnavailable as e:
        masked = e.reason
    except NoVerdict as e:
        masked = f"judge: {e.reason}"
    except TooLong:
        if bench is None:
            raise
        masked = "prompt_too_long"
    finally:
        for dialogue in table.dialogues:
            dialogue.end()
    if masked is None and any(turn.stop is Stop.ABORTED for turn in table.turns):
        masked = "aborted"
    returns = table.match.returns() if forfeit is None else forfeit_returns(game, forfeit, rule.forfeit)
    account = table.settle(None if forfeit is None else returns)
    parts = account.parts if forfeit is None else [{"forfeit": value} for value in returns]
    return Episode(
        id=plan.episode,
        game=plan.game,
        seed=plan.match_seed,
        seats=plan.seats,
        roles=game.roles,
        turns=table.turns,
        returns=returns,
        forfeit=forfeit,
        masked=masked,
        parts=tuple(dict(terms) for terms in parts) if isinstance(table.match, Paying) else (),
        tags=dict(account.tags),
        counts={**account.counts, **table.compared},
    )


class _Table:
    """A match in play: the seats' memories and the turns so far."""

    def __init__(
        self, plan: MatchPlan, game: Game, match: Match, players: Sequence[Player], rule: HouseRules
    ) -> None:
        self.plan, self.game, self.match, self.players, self.rule = plan, game, match, players, rule
        self.turns: list[Turn] = []
        self.past: list[list[Past]] = [[] for _ in players]
        self.dialogues = [Dialogue() for _ in players]
        self.moves: list[dict[int, int]] = []  # the turn of each accepted action, by joint move and seat
        self.asked = 0
        self.rulings = 0
        self.compared: Counter[str] = Counter()  # how a second judge's verdicts compare with the first's

    async def move(self, seats: Sequence[int]) -> None:
        """One joint move: every seat of `seats` answers, refused ones again, until the game accepts."""
        actions: dict[int, str] = {}
        problems: dict[int, str | None] = dict.fromkeys(seats)
        attempts = dict.fromkeys(seats, 0)
        latest: dict[int, int] = {}  # this move's last reply of each seat
        waiting = list(seats)
        while waiting:
            asks = [self._ask(seat, attempts[seat], problems[seat]) for seat in waiting]
            replies = await self._answers(asks)
            latest |= {a.seat: self._record(a, r) for a, r in zip(asks, replies, strict=True)}
            actions |= {a.seat: r.action for a, r in zip(asks, replies, strict=True) if r.action is not None}
            refused = {seat: NOTHING_PARSED for seat in seats if seat not in actions}
            if not refused:
                try:
                    self.match.play(actions)
                except IllegalAction as e:
                    refused = {e.seat: e.reason}
                    del actions[e.seat]
            for seat, reason in refused.items():
                self._refuse(seat, latest[seat], reason)
                attempts[seat] += 1
                problems[seat] = reason
            for seat in refused:  # after all are marked; where several are out of attempts, the first pays
                if attempts[seat] > self.rule.retries:
                    raise _Forfeit(seat)
            waiting = list(refused)
        self.moves.append(latest)

    async def judge(self, bench: Bench | None, forfeited: bool = False) -> None:
        """Have judged what the match waits for. Raises NoVerdict."""
        if bench is None:
            return
        assert isinstance(self.match, Judged), "a game that names judges has matches that ask them"
        while (asked := self.match.pending(forfeited)) is not None:
            ruling, compared = await bench.rule(f"match {self.plan.episode}, {self.rulings}", *asked)
            self.rulings += 1
            self.compared += compared
            self.match.settle(ruling)

    def settle(self, forfeit: Sequence[float] | None) -> Account:
        """Pay the turns what the match owes them by name; returns its account, empty where it has none.

        `forfeit` are the returns of a match that was forfeited.
        """
        if not isinstance(self.match, Paying):
            return Account()
        account = self.match.account(forfeit)
        for turns, paid in zip(self.moves, account.moves, strict=True):
            for seat, terms in paid.items():
                self.turns[turns[seat]].rewards.update(terms)
        return account

    async def _answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """All replies, in the order of `asks`. When one player fails, the others are cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self.players[a.seat].answer(a)) for a in asks]
        except BaseExceptionGroup as several:
            # An engine that is gone masks the episode; what else went wrong must not hide behind it.
            worst = [e for e in several.exceptions if not isinstance(e, EngineUnavailable)]
            raise (worst or several.exceptions)[0] from several
        return [task.result() for task in running]

    def _ask(self, seat: int, attempt: int, problem: str | None) -> Ask:
        seed = derive(self.plan.reply_seed, self.asked)
        self.asked += 1
        return Ask(
            game=self.plan.game,
            seat=seat,
            role=self.game.roles[seat],
            observation=self.match.observe(seat),
            seed=seed,
            attempt=attempt,
            problem=problem,
            past=tuple(self.past[seat]),
            match=self.match,
            dialogue=self.dialogues[seat],
        )

    def _record(self, ask: Ask, reply: Reply) -> int:
        player = self.players[ask.seat]
        index = len(self.turns)
        self.turns.append(
            Turn(
                seat=ask.seat,
                role=ask.role,
                index=index,
                policy=reply.policy or player.policy,
                version=reply.completion.version,
                prompt_ids=reply.prompt_ids,
                completion_ids=reply.completion.ids,
                logprobs=reply.completion.logprobs,
                stop=reply.completion.stop,
                action=reply.action,
                attempt=ask.attempt,
                trainable=player.trainable,
                text=reply.text,
            )
        )
        self.past[ask.seat].append(Past(ask.observation, reply.prompt_ids, reply.completion, None))
        return index

    def _refuse(self, seat: int, index: int, reason: str) -> None:
        # With simultaneous moves the refused reply may be an earlier one than this round's.
        fine = dict(self.match.fine(seat)) if isinstance(self.match, Paying) else {}
        self.turns[index] = replace(self.turns[index], legal=False, rewards=fine)
        self.past[seat][-1] = replace(self.past[seat][-1], problem=reason)

"""`ludus transcripts`: let players play and write their replies down as supervised data.

A player is a word that `ludus tournament` understands (a program, RUN|MODEL, NAME=URL#MODEL), or
`apprentice`, the program that thinks aloud in the game. Rows are worded as the recipe's `text` section says,
for the model that it names where that is there, else for one whose tokenizer has tokens for thoughts.

The rows gather in OUT.part, which becomes OUT when it is complete: a call that fails or is interrupted leaves
whole rows there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ludus import config as configuration
from ludus import contest
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.experts import Choosy
from ludus.games import registry
from ludus.games.base import Game
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import HouseRules
from ludus.seeding import derive
from ludus.sft.transcripts import Seating, Thinks, Writer, watch
from ludus.small.apprentices import apprentice
from ludus.text.prompter import Prompter
from ludus.text.tokenizer import Tokenizer, byte_tokenizer
from ludus.train.assemble import house_rules, open_prompter

APPRENTICE = "apprentice"
AT_ONCE = 256  # matches that are played together at most
FRUITLESS = 2000  # matches in a row without a row, after which nobody waits for one any more


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be written.

    `players` take turns, a match each, and sit in all its seats; with an `opponent` in one seat, a different
    one every time, and the opponent in the others. Only the players' replies become rows.
    """

    game: str
    players: tuple[str, ...]
    opponent: str | None = None
    rows: int = 25_000
    won: bool = False
    role: str | None = None
    thoughts: bool = False  # programs think what the game's apprentice sees
    seed: int = 0


def run(out: Path, order: Order, options: Sequence[str], recipe: Path | None) -> None:
    """Write `out`. `options` are the game's own (key=value), or, with a dot in the key, settings.

    Raises UserError for bad input, and where the players give no reply that could be kept.
    """
    if not out.name.endswith((".jsonl", ".jsonl.zst")):
        raise UserError(f"{out}: name a file that ends in .jsonl or .jsonl.zst")
    part = out.with_name(f"{out.name}.part")
    for path in (out, part):
        if path.exists():
            raise UserError(f"{path} exists already, and nothing is overwritten: remove it, or name another")
    if order.rows < 1:
        raise UserError(f"--rows is {order.rows}; ask for at least 1")
    config, game = _settings(order, options, recipe)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            said = asyncio.run(_write(file, order, config, game, recipe))
        _finish(part, out)
    except (OSError, UserError) as e:
        problem = f"cannot write {out}: {e.strerror}" if isinstance(e, OSError) else str(e)
        kept = f"; the rows until then are in {part}" if part.is_file() and part.stat().st_size else ""
        raise UserError(problem + kept) from e
    finally:
        if part.is_file() and not part.stat().st_size:
            part.unlink()
    print(f"{out}: {said}")


async def _write(file: BinaryIO, order: Order, config: RunConfig, game: Game, recipe: Path | None) -> str:
    """Play until there are enough rows. Returns what was written, in words."""
    opened: list[Player] = []
    rule = house_rules(config, {config.games[0].label: game})
    try:
        for word in (*order.players, *([order.opponent] if order.opponent else [])):
            opened.append(_open(word, config, game, recipe))
        experts = opened[: len(order.players)]
        opponent = opened[-1] if order.opponent else None
        table = _Table(order, config, game, experts, opponent, rule)
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("rows", total=order.rows)
            while table.written < order.rows:
                file.writelines(await table.more())
                file.flush()
                bar.update(task, completed=table.written)
        return table.summary()
    finally:
        for player in opened:
            if isinstance(player, LanguagePlayer):
                await player.engine.close()
        for judge in rule.judges.values():
            await judge.close()


class _Table:
    """Where the matches are played, batch after batch."""

    def __init__(
        self,
        order: Order,
        config: RunConfig,
        game: Game,
        experts: Sequence[Player],
        opponent: Player | None,
        rule: HouseRules,
    ) -> None:
        self.order, self.game, self.experts, self.opponent = order, game, experts, opponent
        self.label = config.games[0].label
        self.rule = rule
        self.in_flight = config.rollout.in_flight
        self.thinks: Thinks | None = None
        if order.thoughts:
            look = apprentice(game.name).look
            self.thinks = lambda ask: look(ask).thought
        self.writer = Writer(_wording(config), won=order.won, role=order.role)
        self.played = self.written = self.fruitless = 0
        self.different: set[str] = set()

    async def more(self) -> list[bytes]:
        """Play a batch; returns its rows as lines. Raises UserError where there have long been none."""
        missing = self.order.rows - self.written
        numbers = range(self.played, self.played + min(AT_ONCE, max(8, missing)))
        seated = [self._seats(number) for number in numbers]
        matches = await watch(
            self.label,
            self.game,
            [
                Seating(players, self._seed("deal", number), self._seed("reply", number))
                for (players, _), number in zip(seated, numbers, strict=True)
            ],
            thinks=self.thinks,
            rule=self.rule,
            in_flight=self.in_flight,
        )
        self.played += len(matches)
        rows = [
            {**row, "player": self.order.players[number % len(self.experts)]}
            for match, (_, seats), number in zip(matches, seated, numbers, strict=True)
            for row in self.writer.rows(match, seats)
        ][:missing]
        self.written += len(rows)
        self.different |= {json.dumps(row["messages"]) for row in rows}
        self.fruitless = 0 if rows else self.fruitless + len(matches)
        lost = all(match.episode.masked is not None for match in matches)
        if lost or self.fruitless >= FRUITLESS:
            raise UserError(
                f"no row came of the last {self.fruitless} matches; replies left out: "
                f"{self._left() or 'none'}"
            )
        return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]

    def summary(self) -> str:
        """What was written."""
        rows = f"{self.written:,} rows, {len(self.different):,} of them different"
        left = f"; replies left out: {self._left()}" if self._left() else ""
        return f"{rows}, of {self.played:,} matches of {self.label} by {', '.join(self.order.players)}{left}"

    def _seats(self, number: int) -> tuple[tuple[Player, ...], Sequence[int]]:
        """Who plays match `number`, and in which seats what is said becomes rows."""
        every = range(len(self.game.roles))
        expert = self.experts[number % len(self.experts)]
        if self.opponent is None:
            return tuple(expert for _ in every), every
        seat = number // len(self.experts) % len(every)
        return tuple(expert if other == seat else self.opponent for other in every), (seat,)

    def _seed(self, what: str, number: int) -> int:
        return derive(self.order.seed, "transcripts", self.label, what, number)

    def _left(self) -> str:
        return ", ".join(f"{count:,} {why}" for why, count in self.writer.left.items() if count)


def _settings(order: Order, options: Sequence[str], recipe: Path | None) -> tuple[RunConfig, Game]:
    """The recipe's settings with the game alone, and that game."""
    words = [word for word in (*order.players, order.opponent) if word not in (None, APPRENTICE)]
    config, _ = contest.settings(recipe, [order.game], [word for word in words if word is not None])
    base = config.model_dump(mode="json")
    own: dict[str, Any] = {}
    for item in options:
        key, eq, _ = item.partition("=")
        if eq and "." not in key:
            configuration.override(own, [item])
        else:
            configuration.override(base, [item])
    base["games"][0]["args"] |= own
    config = configuration.validate(base, where=str(recipe or "settings"))
    game = registry.make(config.games[0].name, **config.games[0].args)
    if order.role is not None and order.role not in game.roles:
        raise UserError(f"{order.game} has no role {order.role!r}; its roles: {', '.join(game.roles)}")
    return config, game


def _open(word: str, config: RunConfig, game: Game, recipe: Path | None) -> Player:
    if word == APPRENTICE:
        return apprentice(game.name)
    player = contest.open_entrant(word, config, recipe).player
    if isinstance(player, Choosy) and not player.plays(game):
        raise UserError(f"{word!r} cannot play {game.name}; name another player")
    return player


def _wording(config: RunConfig) -> Prompter:
    """How prompts and replies are worded. Of the model no more is needed than its tokenizer."""
    model = Path(config.model.path)
    if (model / "tokenizer.json").is_file():
        return open_prompter(config, Tokenizer.load(model), config.model.template)
    return open_prompter(config, byte_tokenizer("<think>", "</think>"), "plain")


def _finish(part: Path, out: Path) -> None:
    """Compress where the name asks for it, force all to the disk, and give the file its name."""
    if out.suffix == ".zst":
        packed = out.with_name(f"{out.name}.tmp")
        with part.open("rb") as source, packed.open("wb") as target:
            zstandard.ZstdCompressor(level=9, write_checksum=True).copy_stream(source, target)
        packed.replace(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(out)

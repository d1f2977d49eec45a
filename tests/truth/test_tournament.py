"""Tournaments: the order that theory knows, the same again, what is kept when something breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ludus.engines.base import EngineUnavailable
from ludus.errors import UserError
from ludus.experts import equilibrium, make_player
from ludus.games.base import HasSpiel
from ludus.games.registry import make
from ludus.players import Ask, Player, Reply
from ludus.rollout.play import HouseRules
from ludus.truth.kept import MATCHES, SETTINGS, Kept
from ludus.truth.tournament import GIVE_UP, Tournament, tournament


@dataclass
class Fickle:
    """Plays at random like `random`, and fails as it is told to."""

    policy: str = "fickle"
    trainable: bool = False
    dead: bool = False  # its server is gone
    error: Exception | None = None
    breaks_after: int = 10**9  # answers
    asked: int = 0
    seats: list[int] = field(default_factory=list)

    async def answer(self, ask: Ask) -> Reply:
        self.asked += 1
        self.seats.append(ask.seat)
        await asyncio.sleep(0)
        if self.asked > self.breaks_after:
            raise RuntimeError("the power went")
        if self.dead:
            raise EngineUnavailable("http://nowhere/v1", "connection")
        if self.error is not None:
            raise self.error
        return await make_player("random").answer(ask)


def run(
    entrants: Mapping[str, Player] | str, game: str = "kuhn_poker", keep: Path | None = None, **options: Any
) -> Tournament:
    if isinstance(entrants, str):
        entrants = {name: make_player(name) for name in entrants.split()}
    options = {"matches": 20, "seed": 4, **options}
    return asyncio.run(tournament({game: make(game)}, entrants, keep=keep, **options))


def lines(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (keep / MATCHES).read_text().splitlines()]


def names(found: Tournament, game: str = "kuhn_poker") -> list[str]:
    return [standing.name for standing in found.games[game].ranking.standings]


def value(rules: HasSpiel, state: Any, seat: int) -> float:
    """What CFR+'s policy in `seat` earns against uniform play, over the whole tree."""
    if state.is_terminal():
        return float(state.returns()[seat])
    if state.is_chance_node():
        law = dict(state.chance_outcomes())
    elif state.current_player() == seat:
        law = equilibrium(rules)[state.information_state_string()]
    else:
        law = dict.fromkeys(state.legal_actions(), 1 / len(state.legal_actions()))
    return sum(p * value(rules, state.child(action), seat) for action, p in law.items() if p)


def test_kuhn_poker_ranks_the_equilibrium_first() -> None:
    found = run("random cfr", matches=600).games["kuhn_poker"]
    cfr, chance = found.ranking.standings
    assert (cfr.name, cfr.place, chance.place) == ("cfr", (1, 1), (2, 2))
    assert (cfr.nash, cfr.alpha_rank) == (1, 1)
    rules = make("kuhn_poker")
    assert isinstance(rules, HasSpiel)
    exact = sum(value(rules, rules.spiel.new_initial_state(), seat) for seat in (0, 1)) / 2
    assert cfr.margin_ci95[0] < exact < cfr.margin_ci95[1]
    score = found.payoffs["cfr"]["random"]
    assert score is not None
    assert score.mean_return == pytest.approx(cfr.margin)
    assert score.matches == 600


def test_tic_tac_toe_ranks_as_theory_says() -> None:
    found = run("random mcts:20 minimax", "tic_tac_toe", matches=40).games["tic_tac_toe"]
    assert [s.name for s in found.ranking.standings] == ["minimax", "mcts:20", "random"]
    assert [s.place for s in found.ranking.standings] == [(1, 1), (2, 2), (3, 3)]
    best = found.ranking.standings[0]
    assert best.loss == 0  # best play loses to nobody
    assert best.rating_ci95[0] > found.ranking.standings[1].rating_ci95[1]


def test_two_of_a_kind_are_a_tie() -> None:
    found = run({"one": make_player("minimax"), "two": make_player("minimax")}, "tic_tac_toe", matches=8)
    ranking = found.games["tic_tac_toe"].ranking
    assert ranking.ties == (("one", "two"),)
    assert [s.draw for s in ranking.standings] == [1, 1]
    assert [s.rating for s in ranking.standings] == pytest.approx([0, 0], abs=1e-6)


def test_the_same_again_whatever_the_order_and_the_company(tmp_path: Path) -> None:
    one = run("cfr random", keep=tmp_path / "one")
    assert one.to_json() == run("random cfr", keep=tmp_path / "two", in_flight=1).to_json()
    assert (tmp_path / "one" / MATCHES).read_bytes() != b""
    assert sorted(map(str, lines(tmp_path / "one"))) == sorted(map(str, lines(tmp_path / "two")))
    assert one.to_json() != run("cfr random", seed=5).to_json()
    company = run("cfr random mcts:2")
    assert (
        company.games["kuhn_poker"].payoffs["cfr"]["random"]
        == one.games["kuhn_poker"].payoffs["cfr"]["random"]
    )
    assert json.loads(json.dumps(one.to_json())) == one.to_json()


def test_every_deal_is_played_in_both_seatings() -> None:
    fickle = Fickle()
    found = run({"f": fickle, "cfr": make_player("cfr")}, matches=7)
    score = found.games["kuhn_poker"].payoffs["f"]["cfr"]
    assert score is not None
    assert score.matches == 8  # whole deals
    assert {0, 1} == set(fickle.seats)


def test_an_interruption_keeps_what_was_played_and_a_rerun_plays_the_rest(tmp_path: Path) -> None:
    def entrants(fickle: Fickle) -> dict[str, Player]:
        return {"fickle": fickle, "cfr": make_player("cfr"), "mcts:2": make_player("mcts:2")}

    counted = Fickle()
    whole = run(entrants(counted))
    breaking = Fickle(breaks_after=counted.asked // 2)
    with pytest.raises(RuntimeError, match="the power went"):
        run(entrants(breaking), keep=tmp_path, in_flight=4)
    kept = lines(tmp_path)
    assert 0 < len(kept) < 30
    # The machine died in the middle of a line.
    with (tmp_path / MATCHES).open("a") as file:
        file.write('{"game": "kuhn_poker", "pair": ["cfr"')
    rest = Fickle()
    resumed = run(entrants(rest), keep=tmp_path)
    assert resumed.to_json() == whole.to_json()
    assert lines(tmp_path)[: len(kept)] == kept
    assert len(lines(tmp_path)) == 30
    assert rest.asked < counted.asked
    again = Fickle()
    assert run(entrants(again), keep=tmp_path).to_json() == whole.to_json()
    assert again.asked == 0


def test_more_matches_and_entrants_join_what_is_there(tmp_path: Path) -> None:
    run("cfr random", keep=tmp_path, matches=6)
    fickle = Fickle()
    more = run(
        {"cfr": make_player("cfr"), "random": make_player("random"), "x": fickle}, keep=tmp_path, matches=8
    )
    fresh = run({"cfr": make_player("cfr"), "random": make_player("random"), "x": Fickle()}, matches=8)
    assert more.to_json() == fresh.to_json()
    assert len(lines(tmp_path)) == 3 + 1 + 8
    # Fewer matches are the first ones.
    assert run("cfr random", keep=tmp_path, matches=2).to_json() == run("cfr random", matches=2).to_json()


def test_a_lost_endpoint_fails_its_own_pairs_alone(tmp_path: Path) -> None:
    def entrants(fickle: Fickle) -> dict[str, Player]:
        return {"gone": fickle, "cfr": make_player("cfr"), "random": make_player("random")}

    fickle = Fickle(dead=True)
    found = run(entrants(fickle), keep=tmp_path, matches=100, in_flight=4)
    assert fickle.asked <= GIVE_UP + 4  # and not 200 times
    ranking = found.games["kuhn_poker"].ranking
    assert ranking.absent == ("gone",)
    assert sorted(names(found)) == ["cfr", "random"]
    assert found.games["kuhn_poker"].payoffs["gone"]["cfr"] is None
    (problem,) = found.problems
    assert problem.startswith("200 matches could not be played (kuhn_poker, cfr against gone; ")
    assert problem.endswith("gone: http://nowhere/v1: connection")
    # It comes back: its pairs are played, the others are not played again.
    back = run(entrants(Fickle()), keep=tmp_path, matches=100)
    assert back.problems == ()
    assert back.to_json() == run(entrants(Fickle()), matches=100).to_json()


def test_a_short_silence_costs_its_matches_alone() -> None:
    class Hiccup(Fickle):
        async def answer(self, ask: Ask) -> Reply:
            if self.asked == 9:
                self.asked += 1
                raise EngineUnavailable("http://nowhere/v1", "connection")
            return await super().answer(ask)

    found = run({"f": Hiccup(), "cfr": make_player("cfr")})
    score = found.games["kuhn_poker"].payoffs["f"]["cfr"]
    assert score is not None
    assert (score.matches, score.masked) == (19, 1)
    assert found.problems == (
        "1 matches could not be played (kuhn_poker, cfr against f): f: http://nowhere/v1: connection",
    )


def test_an_entrant_that_is_wrongly_set_up_fails_its_own_pairs_alone(tmp_path: Path) -> None:
    wrong = Fickle(error=UserError("the prompt does not fit; raise engine.context"))
    found = run({"w": wrong, "cfr": make_player("cfr"), "random": make_player("random")}, keep=tmp_path)
    assert sorted(names(found)) == ["cfr", "random"]
    assert found.problems[0].endswith("w: the prompt does not fit; raise engine.context")
    assert len(lines(tmp_path)) == 10


def test_progress_is_told_and_deals_are_kept_while_others_are_yet_to_begin(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    written: list[int] = []
    asked: list[int] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        written.append(len(lines(tmp_path)))
        asked.append(fickle.asked)

    fickle = Fickle()
    run({"f": fickle, "cfr": make_player("cfr")}, keep=tmp_path, tell=tell)
    assert told == [(n, 10) for n in range(11)]
    assert written == list(range(11))  # each on the disk before it is told
    assert asked[1] < asked[-1] / 2  # programs do not all begin at once


def test_refused_replies_are_counted() -> None:
    mute = Fickle()

    async def nothing(ask: Ask) -> Reply:
        return Reply(action=None)

    mute.answer = nothing  # type: ignore[method-assign]
    found = run({"mute": mute, "random": make_player("random")}, rule=HouseRules(retries=1))
    score = found.games["kuhn_poker"].payoffs["mute"]["random"]
    assert score is not None
    assert (score.illegal_rate, score.loss, score.mean_return) == (1, 1, -2)


# --- bad input ---


def test_bad_requests_are_refused_before_anything_is_played(tmp_path: Path) -> None:
    for entrants, game, options, says in (
        ("random", "kuhn_poker", {}, "at least two entrants, and random is alone"),
        ("random cfr", "kuhn_poker", {"matches": 0}, "at least 2"),
        ("random minimax", "kuhn_poker", {}, "entrant 'minimax' cannot play 'kuhn_poker'"),
        ("random cfr", "connect_four", {}, "entrant 'cfr' cannot play 'connect_four'"),
    ):
        with pytest.raises(UserError, match=says):
            run(entrants, game, keep=tmp_path / "none", **options)
    with pytest.raises(UserError, match="at least one game"):
        asyncio.run(tournament({}, {n: make_player(n) for n in ("random", "cfr")}, matches=2, seed=0))
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run("cfr random", keep=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="seed was 4, now 5"):
        run("cfr random", keep=tmp_path, seed=5)
    with pytest.raises(UserError, match=r"\(rule.retries was 0, now 1\)"):
        run("cfr random", keep=tmp_path, rule=HouseRules(retries=1))
    other = {"entrants": {"cfr": {"model": "abc"}, "random": {}}}
    with pytest.raises(UserError, match=r'entrants: cfr was \{\}, now \{"model": "abc"\}'):
        run("cfr random", keep=tmp_path, settings=other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_results_are_told(tmp_path: Path) -> None:
    run("cfr random", keep=tmp_path)
    whole = (tmp_path / MATCHES).read_text()
    (tmp_path / MATCHES).write_text("{}\n" + whole)
    with pytest.raises(UserError, match=r"matches.jsonl, line 1: no result of a deal"):
        run("cfr random", keep=tmp_path)
    (tmp_path / MATCHES).write_text(whole)
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(UserError, match=r"settings.json is damaged"):
        run("cfr random", keep=tmp_path)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match=r"settings.json is missing"):
        run("cfr random", keep=tmp_path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Kept(tmp_path, {"seed": 1}), pytest.raises(UserError, match="another process is writing"):
        Kept(tmp_path, {"seed": 1})
    Kept(tmp_path, {"seed": 1}).__exit__(None, None, None)  # given back
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        Kept(tmp_path / "file" / "deeper", {"seed": 1})

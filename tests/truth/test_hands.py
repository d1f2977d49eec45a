"""How much a policy depends on its hand: pairs counted by hand, distances worked out, chance taken out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ludus.experts import equilibrium
from ludus.games.base import HasSpiel
from ludus.games.registry import make
from ludus.truth.exploitability import exploitability
from ludus.truth.hands import differs, hands
from ludus.truth.policy_table import Estimate, PolicyTable
from ludus.truth.sequence_form import Floats, InformationSet, sequence_form


def spiel(name: str, **options: object) -> HasSpiel:
    game = make(name, **options)
    assert isinstance(game, HasSpiel)
    return game


KUHN = spiel("kuhn_poker")
LEDUC = spiel("leduc_poker")


def table(game: HasSpiel, laws: Callable[[InformationSet], Floats]) -> PolicyTable:
    sets = sequence_form(game).sets
    return PolicyTable(sets, tuple(Estimate(laws(s), 0.0) for s in sets), thoughts=0)


def test_hands_of_kuhn_poker_are_the_cards_at_each_point_of_decision() -> None:
    keys = [s.key for s in sequence_form(KUHN).sets]
    found = {(keys[i], keys[j]) for i, j in hands(KUHN)}
    assert found == {
        (f"{a}{bets}", f"{b}{bets}") for a, b in ("01", "02", "12") for bets in ("", "p", "b", "pb")
    }


def test_hands_of_leduc_poker_share_the_public_card_and_the_bets() -> None:
    form = sequence_form(LEDUC)
    pairs = hands(LEDUC)
    # 24 information sets per rank in round 1 and 2 come to 288 sets: 96 positions of three ranks each.
    assert len(form.sets) == len(pairs) == 288
    for i, j in pairs:
        one, other = form.sets[i].key, form.sets[j].key
        assert one != other
        assert [part for part in one.split("[") if "Private" not in part] == [
            part for part in other.split("[") if "Private" not in part
        ]


def test_a_policy_known_in_full_is_measured_exactly() -> None:
    """Bets with 0.1, 0.5, 0.9 everywhere: differences 0.4, 0.4, 0.8, whose mean square is 0.32."""
    bets = {card: 0.1 + 0.4 * card for card in range(3)}
    policy = {s.key: {0: 1 - bets[int(s.key[0])], 1: bets[int(s.key[0])]} for s in sequence_form(KUHN).sets}
    found = differs(KUHN, PolicyTable.of(KUHN, policy))
    assert found is not None
    assert found[0] == pytest.approx(0.32**0.5)
    report = exploitability(KUHN, policy).to_json()
    assert (report["differs"], report["equilibrium_differs"]) == found
    # Any equilibrium: never with a jack, always with a king, now and then with a queen.
    assert found[1] == pytest.approx(0.66, abs=0.02)


def test_a_policy_that_reads_the_public_card_alone_ignores_its_hand() -> None:
    def public(s: InformationSet) -> Floats:
        law: Floats = np.ones(len(s.actions))
        law[0] += sum(map(ord, s.key.split("][", 2)[2]))  # whatever comes after the private card
        law /= law.sum()
        return law[None]

    found = differs(LEDUC, table(LEDUC, public))
    solved = differs(LEDUC, PolicyTable.of(LEDUC, equilibrium(LEDUC)))
    assert found is not None
    assert solved is not None
    assert found[0] == pytest.approx(0.0, abs=1e-12)
    assert solved[0] == solved[1] == found[1] > 0.6


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_chance_does_not_pass_for_a_difference(spread: float) -> None:
    """Sampled moves, one in ten illegal: the mean square over many tables is that of the policy itself."""
    rng = np.random.default_rng(5)
    replies = 16

    def drawn(s: InformationSet) -> Floats:
        bet = 0.5 + spread * (int(s.key[0]) - 1)
        moves = (rng.random(replies) < bet).astype(int)
        laws: Floats = np.eye(2)[moves] * (rng.random((replies, 1)) < 0.9)
        return laws

    def square() -> float:
        found = differs(KUHN, table(KUHN, drawn))
        assert found is not None
        return found[0] ** 2

    squares = [square() for _ in range(400)]
    truth = spread**2 * (1 + 1 + 4) / 3
    if spread:
        assert np.mean(squares) == pytest.approx(truth, abs=4 * float(np.std(squares)) / 20)
    else:  # chance alone is worth 2 * 0.25 / 14.4 replies = 0.035; what is left of it errs to both sides of 0
        assert np.mean(squares) < 0.01
        assert np.median(squares) < 0.002


def test_two_replies_are_enough_for_a_mean_square_without_bias() -> None:
    """The jack's move is a coin's, seen twice; queen and king never and always bet: (0.25 + 0.25 + 1) / 3."""
    known = {"1": np.array([[1.0, 0.0]]), "2": np.array([[0.0, 1.0]])}
    squares = []
    for moves in ([0, 0], [0, 1], [1, 0], [1, 1]):
        seen: Floats = np.eye(2)[moves]
        laws = {"0": seen, **known}
        found = differs(KUHN, table(KUHN, lambda s, laws=laws: laws[s.key[0]]))  # type: ignore[misc]
        assert found is not None
        squares.append(found[0] ** 2)
    assert np.mean(squares) == pytest.approx(0.5)


def test_hands_without_a_legal_reply_say_nothing() -> None:
    def mute(s: InformationSet) -> Floats:
        return np.zeros((4, 2)) if s.key[0] == "2" else np.array([[0.75, 0.25]])

    found = differs(KUHN, table(KUHN, mute))
    assert found is not None
    assert found[0] == 0.0  # the uniform law that stands in for the king's is not compared
    assert differs(KUHN, table(KUHN, lambda s: np.zeros((4, 2)))) is None


def test_games_that_cannot_be_solved_have_no_figure() -> None:
    dice = spiel("liars_dice")
    assert differs(dice, table(dice, lambda s: np.full((1, len(s.actions)), 1 / len(s.actions)))) is None

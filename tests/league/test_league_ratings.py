"""Ratings by hand, by closed forms, by a published example, and where strength goes round in a circle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import choix
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import beta

from ludus.league.ratings import ELO, Outcome, Ranking, Tally, alpha_rank, bradley_terry, nash_average, rank

# American League baseball, 1987: wins of the row over the column (Agresti, Categorical Data Analysis, 10.6).
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
BASEBALL = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ],
    dtype=np.float64,
)
PUBLISHED = (1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0)  # Agresti's estimates, Baltimore at 0

RPS = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])


def duel(returns: Sequence[float], first: str = "a", second: str = "b") -> list[Outcome]:
    """Deals with the same return of `first` in both seatings."""
    return [
        outcome
        for deal, r in enumerate(returns)
        for outcome in (Outcome(first, second, deal, (r, -r)), Outcome(second, first, deal, (-r, r)))
    ]


def standing(ranking: Ranking, name: str):  # type: ignore[no-untyped-def]
    return next(s for s in ranking.standings if s.name == name)


def test_a_published_example() -> None:
    fitted = bradley_terry(BASEBALL)
    assert fitted - fitted[-1] == pytest.approx(PUBLISHED, abs=0.005)
    assert fitted.mean() == pytest.approx(0, abs=1e-12)


def test_against_the_explicit_likelihood_and_other_algorithms() -> None:
    """Draws included: half a win for both is a whole win for both where every win counts twice."""
    draws = np.array([[0, 3, 1], [3, 0, 8], [1, 8, 0]])
    wins = np.array([[0, 9, 6], [2, 0, 5], [3, 7, 0]])
    mine = bradley_terry(wins + draws / 2)
    data = [(i, j) for i in range(3) for j in range(3) for _ in range(2 * wins[i, j] + draws[i, j])]

    def loss(t: np.ndarray) -> float:
        return sum(float(np.logaddexp(0, t[j] - t[i])) for i, j in data) + float(t.sum()) ** 2

    assert mine == pytest.approx(minimize(loss, np.zeros(3), tol=1e-10).x, abs=1e-5)
    assert mine == pytest.approx(choix.opt_pairwise(3, data, alpha=0, tol=1e-12), abs=1e-5)
    assert mine == pytest.approx(choix.mm_pairwise(3, data), abs=1e-5)


def test_two_entrants_differ_by_the_logit_of_the_share() -> None:
    # 30 won, 6 drawn, 14 lost deals: 66 of 100 points, and one drawn deal more by the prior.
    ranking = rank(Tally.of(["a", "b"], duel([1] * 30 + [0] * 6 + [-1] * 14)))
    a, b = ranking.standings
    share = 34 / 51 - 0.5 / 51  # (30 + 3 + 0.5) / 51
    assert a.rating - b.rating == pytest.approx(ELO * math.log(share / (1 - share)))
    assert a.rating == pytest.approx(-b.rating)
    assert (a.name, a.matches, a.win, a.draw, a.loss) == ("a", 100, 0.6, 0.12, 0.28)
    assert a.margin == pytest.approx(0.32)
    assert (a.place, b.place) == ((1, 1), (2, 2))
    assert ranking.ties == ()
    assert ranking.misfit < 0.01  # the prior alone


@pytest.mark.parametrize(("won", "lost"), [(20, 0), (12, 8), (3, 1)])
def test_the_bootstrap_of_one_pair_is_jeffreys_interval(won: int, lost: int) -> None:
    """Deals that are won or lost whole leave a Beta(won + 1/2, lost + 1/2) law of the share."""
    ranking = rank(Tally.of(["a", "b"], duel([1] * won + [-1] * lost)))
    law = beta(won + 0.5, lost + 0.5)
    low, high = law.ppf(0.025), law.ppf(0.975)
    a = standing(ranking, "a")
    expected = [ELO / 2 * math.log(x / (1 - x)) for x in (low, high)]
    assert a.rating_ci95 == pytest.approx(expected, rel=0.15, abs=12)
    assert a.margin_ci95[0] == pytest.approx(2 * low - 1, abs=0.06)
    assert a.margin_ci95[1] == pytest.approx(max(2 * high - 1, a.margin), abs=0.06)
    assert math.isfinite(a.rating)
    assert (a.place == (1, 1)) is bool(low > 0.5)


def test_rock_paper_scissors_is_a_tie_that_ratings_do_not_explain() -> None:
    outcomes = [
        o
        for first, second, r in (("rock", "scissors", 1), ("paper", "rock", 1), ("scissors", "paper", 1))
        for o in duel([r] * 40, first, second)
    ]
    ranking = rank(Tally.of(["rock", "paper", "scissors"], outcomes))
    assert [s.rating for s in ranking.standings] == pytest.approx([0, 0, 0], abs=1e-4)
    assert [s.nash for s in ranking.standings] == pytest.approx([1 / 3] * 3)
    assert [s.alpha_rank for s in ranking.standings] == pytest.approx([1 / 3] * 3)
    assert [s.against_nash for s in ranking.standings] == pytest.approx([0] * 3, abs=1e-8)
    assert [s.place for s in ranking.standings] == [(1, 3)] * 3
    assert ranking.ties == (("paper", "rock", "scissors"),)
    assert ranking.misfit == pytest.approx(1)  # sure wins that the ratings call even


def test_chips_count_and_not_pots() -> None:
    """a wins every third pot, but a large one."""
    ranking = rank(Tally.of(["a", "b"], duel([4, -1, -1] * 40)))
    assert [s.name for s in ranking.standings] == ["a", "b"]
    a = standing(ranking, "a")
    assert (a.win, a.loss) == pytest.approx((1 / 3, 2 / 3))
    assert a.margin == pytest.approx(2 / 3)
    assert a.place == (1, 1)


def test_margins_are_what_one_got_more_than_the_other() -> None:
    """In a game that is not zero-sum, too: 3 against 1 is a margin of 1 for one and -1 for the other."""
    outcomes = [Outcome("a", "b", 0, (3, 1)), Outcome("b", "a", 0, (2, 2))]
    tally = Tally.of(["a", "b"], outcomes)
    assert tally.stake == 1
    assert tally.points.tolist() == [[[0, 1.5], [0.5, 0]]]
    assert tally.gains.tolist() == [[[0, 1], [-1, 0]]]
    assert tally.counts()[:, :, 0, 1].tolist() == [[1, 0, 0], [0, 1, 0]]  # a won in seat 0, drew in seat 1
    assert tally.counts()[:, :, 1, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_what_was_not_played_does_not_count() -> None:
    outcomes = [*duel([1, 1, -1]), Outcome("a", "c", 7, (1, -1))]
    ranking = rank(Tally.of(["a", "b", "c", "idle"], outcomes))
    assert ranking.absent == ("idle",)
    assert {s.name: s.matches for s in ranking.standings} == {"a": 7, "b": 6, "c": 1}
    assert standing(ranking, "c").margin == -1  # a alone was met
    assert standing(ranking, "b").margin == pytest.approx(-1 / 3)
    nobody = rank(Tally.of(["a", "b"], []))
    assert (nobody.standings, nobody.absent) == ((), ("a", "b"))


def test_groups_that_cannot_be_told_apart_may_overlap() -> None:
    """a is above c, and b between them is like both."""
    rng = np.random.default_rng(0)
    outcomes = [
        o
        for first, second, won in (("a", "b", 33), ("b", "c", 33), ("a", "c", 40))
        for o in duel(rng.permutation([1] * won + [-1] * (60 - won)).tolist(), first, second)
    ]
    ranking = rank(Tally.of(["c", "b", "a"], outcomes))
    assert [s.name for s in ranking.standings] == ["a", "b", "c"]
    assert ranking.ties == (("a", "b"), ("b", "c"))
    assert [s.place for s in ranking.standings] == [(1, 2), (1, 3), (2, 3)]


def test_luck_of_the_deal_that_all_pairs_share_widens_the_intervals() -> None:
    """On the same deals a beats b and b beats c: as many independent deals would say more about a and c."""
    won = [1] * 34 + [-1] * 26
    shared = [o for pair in (("a", "b"), ("b", "c"), ("a", "c")) for o in duel(won, *pair)]
    rng = np.random.default_rng(1)
    apart = [
        o for pair in (("a", "b"), ("b", "c"), ("a", "c")) for o in duel(rng.permutation(won).tolist(), *pair)
    ]
    widths = []
    for outcomes in (shared, apart):
        low, high = standing(rank(Tally.of(["a", "b", "c"], outcomes)), "a").rating_ci95
        widths.append(high - low)
    assert widths[0] > 1.2 * widths[1]


def test_equal_entrants_are_told_apart_about_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(12):
        coins = np.where(rng.random(50) < 0.5, 1.0, -1.0).tolist()
        wrong += not rank(Tally.of(["a", "b"], duel(coins)), seed).ties
    assert wrong <= 3  # each with probability 1/20; more than 3 of 12 has 1/4000


def test_the_same_seed_gives_the_same_intervals() -> None:
    tally = Tally.of(["a", "b"], duel([1, 1, -1, 0, 1]))
    assert rank(tally, 1) == rank(tally, 1)
    assert rank(tally, 1) != rank(tally, 2)


def test_no_finite_ratings_without_a_prior() -> None:
    with pytest.raises(ValueError, match="took no point"):
        bradley_terry(np.array([[0.0, 5.0], [0.0, 0.0]]))


def test_nash_averaging_by_hand() -> None:
    assert nash_average(RPS) == pytest.approx([1 / 3] * 3)
    # Rock against scissors at double stakes: each one's share is half the payoff of the other two's match.
    assert nash_average(np.array([[0, 2, -1], [-2, 0, 1], [1, -1, 0.0]])) == pytest.approx(
        [1 / 4, 1 / 4, 1 / 2]
    )
    assert nash_average(np.zeros((4, 4))).tolist() == [1 / 4] * 4
    assert nash_average(np.array([[0, 0, 1], [0, 0, 1], [-1, -1, 0.0]])) == pytest.approx([1 / 2, 1 / 2, 0])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 7), seed=st.integers(0, 2**32 - 1))
def test_nash_averaging_is_an_equilibrium_and_copies_change_nothing(n: int, seed: int) -> None:
    upper = np.triu(np.random.default_rng(seed).integers(-3, 4, (n, n)), 1).astype(float)
    payoffs = upper - upper.T
    mixture = nash_average(payoffs)
    assert mixture.sum() == pytest.approx(1)
    assert (payoffs @ mixture).max() <= 1e-6
    rows = [*range(n), 0]
    copied = nash_average(payoffs[np.ix_(rows, rows)])
    assert copied[0] == pytest.approx(copied[n], abs=1e-6)
    together = copied[:n].copy()
    together[0] += copied[n]
    assert (payoffs @ together).max() <= 1e-6


def test_alpha_rank_ends_where_nobody_leaves() -> None:
    assert alpha_rank(np.triu(np.ones((4, 4)), 1)) == pytest.approx([1, 0, 0, 0])
    circle = np.zeros((4, 4))
    circle[:3, :3] = RPS > 0
    circle[:3, 3] = 1
    assert alpha_rank(circle) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert alpha_rank(np.zeros((2, 2))) == pytest.approx([1 / 2, 1 / 2])

"""Who is stronger: ratings, places and ties out of the results of a round robin.

A *deal* is one seed that every two entrants play twice, once in each seating. The *margin* of a match is
half of what an entrant got more than the other one (in a zero-sum game: its return), the *stake* the
largest margin of any match, and an entrant's *share* (1 + margin / stake) / 2: 1 for a win, 1/2 for a draw
and 0 for a loss where wins are all alike, and in poker what its chips say. (Pots won would put a good player,
which folds bad cards, below a random one.) Three ways to rank, as each alone can mislead:

rating      Bradley and Terry (1952): i's mean share against j is 1 / (1 + exp(-(t_i - t_j))). A draw is half
            a win for either side, which is Elo's convention and lets the difference of two ratings say
            what to expect. (Davidson's 1970 model with its own parameter for draws gives the same order in a
            full round robin, but its ratings speak of the decided matches alone.) Fitted by `choix`.
alpha-rank  Omidshafiei et al. (2019), in the limit of strong selection: where a population ends up that goes
            over from an entrant to one that beats it. It needs no transitivity.
Nash        Nash averaging (Balduzzi et al. 2018): the equilibrium of largest entropy of the game in which
            one picks an entrant. It needs none either, and copies of an entrant change nothing for others.

Legend: D deals, N entrants, R replicates of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import choix
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ELO = 400 / math.log(10)  # rating points per unit of log-odds: 400 points are odds of 10 to 1
PRIOR = 1.0  # deals that every two entrants are taken to have drawn before they met
REPLICATES = 1_000  # of the bootstrap
_SUPPORT = 1e-6  # below it a probability counts as 0: the linear programs are solved to 1e-7


@dataclass(frozen=True, slots=True)
class Outcome:
    """One match that was played to its end: who sat where, on which deal, and what they got."""

    first: str  # in seat 0
    second: str
    deal: int
    returns: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """All results: `margins` [D, N, N], entry [d, i, j] that of i in seat 0 against j in seat 1 on deal d.

    NaN where nothing was played.
    """

    names: tuple[str, ...]
    margins: Floats

    @staticmethod
    def of(names: Sequence[str], outcomes: Iterable[Outcome]) -> Tally:
        """Sort outcomes into the array; the last one counts where one match occurs twice."""
        at = {name: i for i, name in enumerate(names)}
        found = {(o.deal, at[o.first], at[o.second]): o.returns for o in outcomes}
        margins = np.full((1 + max((d for d, _, _ in found), default=-1), len(names), len(names)), np.nan)
        for index, (mine, theirs) in found.items():
            margins[index] = (mine - theirs) / 2
        return Tally(tuple(names), margins)

    def only(self, keep: Sequence[int]) -> Tally:
        """The results among the entrants `keep`, by index."""
        rows = np.array(keep)
        return Tally(tuple(self.names[i] for i in keep), self.margins[:, rows][:, :, rows])

    @property
    def stake(self) -> float:
        """The largest margin; 1 where nobody ever gained anything."""
        return float(np.nanmax(np.abs(self.margins), initial=0.0)) or 1.0

    @property
    def played(self) -> Floats:
        """Matches of each deal and unordered pair, [D, N, N], symmetric: 0, 1 or 2."""
        once = (~np.isnan(self.margins)).astype(np.float64)
        return once + once.transpose(0, 2, 1)

    @property
    def gains(self) -> Floats:
        """The margins of i over j, summed over both seatings, [D, N, N], antisymmetric."""
        return np.nan_to_num(self.margins) - np.nan_to_num(self.margins.transpose(0, 2, 1))

    @property
    def points(self) -> Floats:
        """The shares of i against j, summed over both seatings, [D, N, N]: 0 to 2."""
        return (self.played + self.gains / self.stake) / 2

    def counts(self) -> NDArray[np.int64]:
        """Wins, draws and losses of i against j, by i's seat: [seat, outcome, N, N]."""
        seats = (self.margins, -self.margins.transpose(0, 2, 1))
        return np.array([[(np.sign(m) == sign).sum(axis=0) for sign in (1, 0, -1)] for m in seats])


@dataclass(frozen=True, slots=True)
class Standing:
    """One entrant. Intervals are of 95%.

    `rating` is in points (`ELO`), the mean of all entrants is 0. `place` is the best and the worst place
    that the data allow: 1 + the entrants that are clearly better, N - those that are clearly worse.
    `margin` is the mean per match; `win`, `draw` and `loss` are shares of the matches; all of them are means
    over the opponents met, each counted alike. `alpha_rank` and `nash` add up to 1 over the entrants;
    `against_nash` is the margin against the mixture `nash`: 0 within it, at most 0 outside.
    """

    name: str
    rating: float
    rating_ci95: tuple[float, float]
    place: tuple[int, int]
    margin: float
    margin_ci95: tuple[float, float]
    win: float
    draw: float
    loss: float
    alpha_rank: float
    nash: float
    against_nash: float
    matches: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The entrants that played, best rating first.

    `ties` are the largest groups of entrants no two of which can be told apart. `misfit` is the largest
    difference between a pair's mean margin and what their ratings predict: large where strength is cyclic.
    `absent` played no match at all.
    """

    standings: tuple[Standing, ...]
    ties: tuple[tuple[str, ...], ...]
    misfit: float
    absent: tuple[str, ...] = ()


def rank(tally: Tally, seed: int = 0) -> Ranking:
    """Rank the entrants that played; an empty ranking where no two did.

    Intervals come from a Bayesian bootstrap over deals (Rubin 1981), drawn from `seed`: each deal weighs an
    exponential variable, the same one in all pairs, since all play the same deals. The prior (`PRIOR` drawn
    deals between every two entrants) keeps the rating of one that wins everything finite. In the bootstrap
    its won and its lost half weigh independent Gamma(1/2) variables, so that a pair which always ends alike
    has Jeffreys' interval, not a point. Two entrants count as told apart where the 95%
    interval of their difference excludes 0; with many pairs, one in twenty of the equal ones will by chance.

    Alpha-rank takes a pair as even unless its margins are told apart, for in the limit of strong selection a
    single chance point would count as much as a landslide. Nash averaging takes the margins as they are.
    """
    met = tally.played.sum(axis=(0, 2)) > 0
    keep = [i for i in range(len(tally.names)) if met[i]]
    absent = tuple(name for i, name in enumerate(tally.names) if not met[i])
    if len(keep) < 2:
        return Ranking((), (), 0.0, absent)
    own = tally.only(keep)
    played = own.played.sum(axis=0)
    ratings = bradley_terry(own.points.sum(axis=0) / 2 + PRIOR / 2)
    drawn_ratings, drawn_margins = _bootstrap(own, ratings, np.random.default_rng(seed))
    better = _clearly(drawn_ratings[:, :, None] - drawn_ratings[:, None, :])
    margins = own.gains.sum(axis=0) / np.maximum(played, 1)
    results = own.counts().sum(axis=0) / np.maximum(played, 1)
    predicted = own.stake * np.tanh((ratings[:, None] - ratings[None, :]) / 2)
    shares = alpha_rank(np.where(_clearly(drawn_margins), 1.0, 0.0))
    nash = nash_average(margins)
    standings = []
    for i, name in enumerate(own.names):
        met_i = played[i] > 0
        win, draw, loss = results[:, i, met_i].mean(axis=1)
        margin = float(margins[i, met_i].mean())
        standing = Standing(
            name=name,
            rating=float(ELO * ratings[i]),
            rating_ci95=_interval(ELO * drawn_ratings[:, i], float(ELO * ratings[i])),
            place=(1 + int(better[:, i].sum()), len(keep) - int(better[i].sum())),
            margin=margin,
            margin_ci95=_interval(drawn_margins[:, i, met_i].mean(axis=1), margin),
            win=float(win),
            draw=float(draw),
            loss=float(loss),
            alpha_rank=float(shares[i]),
            nash=float(nash[i]),
            against_nash=float(margins[i] @ nash),
            matches=int(played[i].sum()),
        )
        standings.append(standing)
    order = sorted(range(len(keep)), key=lambda i: (-round(standings[i].rating, 9), own.names[i]))
    even = ~(better | better.T)
    return Ranking(
        standings=tuple(standings[i] for i in order),
        ties=tuple(tuple(own.names[i] for i in order if i in group) for group in _cliques(even, order)),
        misfit=float(np.abs(margins - predicted)[played > 0].max()),
        absent=absent,
    )


def bradley_terry(points: Floats, start: Floats | None = None) -> Floats:
    """Maximum-likelihood log-odds [N], with mean 0, from what i scored against j, [N, N].

    Points may be fractions: a draw is half a point for both. `start` is a first guess. Raises ValueError
    where the likelihood has no maximum, as for an entrant that wins everything: see `rank` for the remedy.
    """
    wins = np.array(points, dtype=np.float64)
    np.fill_diagonal(wins, 0.0)
    if not _connected(wins > 0):
        raise ValueError("some entrants took no point from the others, so no finite ratings fit best")
    fitted: Floats = choix.ilsr_pairwise_dense(wins, initial_params=start, max_iter=10_000)
    return fitted


def alpha_rank(beats: Floats) -> Floats:
    """The stationary shares [N] of alpha-rank's population in the limit of strong selection.

    `beats` [N, N]: entry [i, j] above entry [j, i] says that i beats j, equal ones that neither does. As
    every two entrants are compared, exactly one group of them cannot be left, and no mutation noise is
    needed to make the shares unique.
    """
    from open_spiel.python.egt import alpharank  # it loads all of matplotlib

    _, _, shares, _, _ = alpharank.compute([np.asarray(beats)], use_inf_alpha=True, inf_alpha_eps=0.0)
    clean = np.maximum(np.asarray(shares, dtype=np.float64), 0.0)
    clean[clean < 1e-12] = 0.0
    total: Floats = clean / clean.sum()
    return total


def nash_average(payoffs: Floats) -> Floats:
    """The symmetric equilibrium of largest entropy, [N], of an antisymmetric matrix of payoffs [N, N].

    (OpenSpiel has it too, for those who have cvxpy.) First linear programs find who occurs in any
    equilibrium at all. Among those the conditions are equalities with an interior solution, so the dual of
    the entropy problem, p = softmax(-A'l) at the l that minimises log sum exp(-A'l), is smooth and has a
    minimum.
    """
    size, n = float(np.abs(payoffs).max()), len(payoffs)
    if size == 0:
        return np.full(n, 1 / n)
    scaled = payoffs / size
    most = [
        linprog(-unit, A_ub=scaled, b_ub=np.zeros(n), A_eq=np.ones((1, n)), b_eq=[1.0]) for unit in np.eye(n)
    ]
    inside = np.array([-found.fun > _SUPPORT for found in most])
    columns = scaled[:, inside]

    def dual(weights: Floats) -> tuple[float, Floats]:
        exponents = -columns.T @ weights
        top = exponents.max()
        p = np.exp(exponents - top)
        return float(top + np.log(p.sum())), -columns @ (p / p.sum())

    bounds = [(None, None) if i else (0.0, None) for i in inside]
    solved = minimize(
        dual,
        np.zeros(n),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10},
    )
    exponents = -columns.T @ solved.x
    p = np.exp(exponents - exponents.max())
    mixture = np.zeros(n)
    mixture[inside] = p / p.sum()
    return mixture


def _bootstrap(tally: Tally, ratings: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Replicates of the ratings [R, N] in log-odds and of the mean margins [R, N, N]."""
    deals, n, _ = tally.margins.shape
    weights = rng.standard_exponential((REPLICATES, deals))
    played, points = (
        (weights @ part.reshape(deals, -1)).reshape(-1, n, n) / 2 for part in (tally.played, tally.points)
    )
    won = rng.standard_gamma(PRIOR / 2, (REPLICATES, n, n))
    points = points + won
    drawn = np.array([bradley_terry(p, ratings) for p in points])
    shares = points / (played + won + won.transpose(0, 2, 1))
    return drawn, tally.stake * (2 * shares - 1)


def _clearly(differences: Floats) -> Bools:
    """Where replicates [R, ...] lie above 0 with the whole of their central 95%."""
    above: Bools = np.quantile(differences, 0.025, axis=0) > 0
    return above


def _interval(values: Floats, figure: float) -> tuple[float, float]:
    """The central 95% of replicates; contains the figure itself, also where that is as high as can be."""
    low, high = np.quantile(values, [0.025, 0.975])
    return min(float(low), figure), max(float(high), figure)


def _connected(edges: Bools) -> bool:
    """Whether every entrant leads to every other one along edges."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges).bit_length()):  # each round doubles the length of the paths
        reach = reach @ reach
    return bool(reach.all())


def _cliques(even: Bools, order: Sequence[int]) -> list[set[int]]:
    """The maximal groups of two or more in which every two are `even`, best entrant first."""
    found: list[set[int]] = []

    def grow(group: set[int], candidates: set[int], done: set[int]) -> None:  # Bron and Kerbosch (1973)
        if not candidates and not done and len(group) > 1:
            found.append(group)
        for i in sorted(candidates):
            near = {j for j in range(len(even)) if even[i, j] and j != i}
            grow(group | {i}, candidates & near, done & near)
            candidates = candidates - {i}
            done = done | {i}

    grow(set(), set(range(len(even))), set())
    at = {entrant: k for k, entrant in enumerate(order)}
    return sorted(found, key=lambda group: sorted(at[i] for i in group))

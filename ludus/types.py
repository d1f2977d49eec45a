"""What flows through Ludus: requests, turns, episodes, groups, and the training rows made of them.

    Request -> Completion -> Turn -> Episode -> Group -> (estimator: an advantage per turn) -> Sample -> Batch

Shape legend for `Batch`: B rows, T positions. Everything is aligned on the token it speaks of: entry
[b, t] of a log-probability is that of `tokens[b, t]` given `tokens[b, :t]`; position 0 is never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Stop(StrEnum):
    """Why a completion ended."""

    EOS = "eos"  # the policy sampled an end-of-turn token (the last id of the completion)
    ACTION = "action"  # the action was complete, so nothing more was sampled
    LENGTH = "length"  # the token limit was reached
    ABORTED = "aborted"  # the engine gave up (time-out, lost server); never trained on


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a completion is over, besides its token limit.

    Sampling one of `ids` ends it with Stop.EOS (the id is kept as the last token). After sampling one of
    `triggers`, `closed(completion_ids)` is asked; True ends it with Stop.ACTION.
    `texts` is the nearest thing for servers that stop on strings only.
    """

    ids: frozenset[int]
    triggers: frozenset[int] = frozenset()
    closed: Callable[[Sequence[int]], bool] | None = None
    texts: tuple[str, ...] = ()


class Dialogue:
    """The turns of one seat in one match, each of which goes on where the one before ended.

    An engine may keep something between them: it sets `let_go`, which frees it.
    """

    __slots__ = ("let_go",)

    def __init__(self) -> None:
        self.let_go: Callable[[], None] | None = None

    def end(self) -> None:
        """There are no more turns. May be said more than once."""
        if self.let_go is not None:
            self.let_go()
            self.let_go = None


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample.

    All randomness comes from `seed` (0 <= seed < 2**63) and the position within the completion, never
    from arrival order. `messages` carries the same prompt as (role, content) pairs for engines that speak
    text; token engines ignore it. Requests with the same `dialogue` are turns of one: each prompt begins with
    the one before and its reply, which an engine may use to compute less, never to sample otherwise.
    """

    policy: str
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling
    stop: StopRule
    messages: tuple[tuple[str, str], ...] = ()
    dialogue: Dialogue | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled. `logprobs` are the sampler's own (see `Turn`); text engines leave ids empty."""

    ids: list[int]
    logprobs: list[float]
    stop: Stop
    version: int
    text: str | None = None  # set by engines that speak text only


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """One match to be played: what the matchmaker decides and the rollout carries out.

    Everything random in the match follows from its two seeds, so a lost match is played again exactly.
    """

    episode: int  # id of the episode to come
    group: int  # matches of one group share game, match_seed and seats
    game: str  # label of a game of the run
    seats: tuple[str, ...]  # policy id per seat
    match_seed: int  # deals and chance
    reply_seed: int  # the players' sampling


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of one seat, as it was sampled. Tokens are recorded here and never encoded again.

    `logprobs[k]` (nats) is the log-probability of `completion_ids[k]` under the distribution that was
    really sampled from (temperature, top-p and top-k included). Players that are not language models
    leave the token fields empty. `action` is the parsed action, or None where nothing parsed.
    `rewards` are named terms paid to this turn, besides the game's own returns.
    """

    seat: int
    role: str
    index: int  # number of this reply within its match, from 0, over all seats
    policy: str  # policy id, such as "self", "random" or "past/120"
    version: int  # weights' version that sampled it
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    stop: Stop
    action: str | None
    legal: bool = True  # False: the reply was refused by the parser or the game
    attempt: int = 0  # 0 = first try at this move, 1 = first retry, ...
    trainable: bool = True  # sampled by the policy that is being trained
    text: str = ""  # the whole reply, private thought included: for logs and reports, never for other seats
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished match. `returns[i]` is the game's return of seat i (forfeits included).

    Games that name their pay say more: `parts[i]` are the named terms that `returns[i]` is the sum of, `tags`
    what kind of match it was (such as {"label": "harmful"}), `counts` what happened how often.
    """

    id: int  # unique and increasing within a run
    game: str
    seed: int  # of the match: chance and deals
    seats: tuple[str, ...]  # policy id per seat
    roles: tuple[str, ...]  # role per seat
    turns: list[Turn]
    returns: tuple[float, ...]
    forfeit: int | None = None  # seat whose illegal replies ended the match
    masked: str | None = None  # reason why this episode must not be trained on (engine or judge failure)
    parts: tuple[dict[str, float], ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """Episodes that share game, seed and opponents; a group of one is the common case."""

    episodes: list[Episode]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row. All lists have one entry per token.

    `mask` is True exactly on the tokens that the trained policy sampled; elsewhere `logprobs` and
    `advantages` are 0.0 and must not be read. `turn_ids` numbers the turns within the row from 0
    (-1 where the mask is False).
    """

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]  # behaviour policy's
    advantages: list[float]
    turn_ids: list[int]
    game: str
    role: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows as tensors, all [B, T].

    `turn_weights` is 1 / (number of trained tokens in the token's turn) on trained tokens, else 0, for
    the turn-mean normaliser. Padding has mask False.
    """

    tokens: Tensor  # int64
    mask: Tensor  # bool
    behaviour_logprobs: Tensor  # float32, the sampler's
    proximal_logprobs: Tensor | None  # float32, the learner's before the first update; None: same as current
    advantages: Tensor  # float32
    turn_weights: Tensor  # float32
    lengths: Tensor  # int64 [B], tokens per row without padding

"""The driver's side of rollouts on Ray: matches go out to actors, and come back group by group.

    plans -> groups dealt to the actors -> each plays its share -> groups, as they end -> episodes in order

An actor may die at any moment. What it had not finished is played again from its seeds, by whichever actor is
there; what it had finished is kept. A group counts when it arrives, and nobody else is playing it then: so
every match counts exactly once. Meanwhile another actor is started in the dead one's place, which gets the
weights of all policies as they are by then. As replies depend on seeds and weights alone, and not on who
plays, one actor or several give the same episodes as a run without a cluster (but see docs/scale.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from ludus.config import PAST, RunConfig
from ludus.engines.base import Adapter, Engine, PolicyWeights
from ludus.errors import UserError
from ludus.judges.base import Judge, Stats
from ludus.train.cluster.actor import RolloutActor
from ludus.train.cluster.broadcast import Broadcasts
from ludus.train.cluster.buckets import Bucket, pack
from ludus.train.cluster.connect import check_alive, connect, place, placed
from ludus.train.past import PastSelves, past_weights
from ludus.types import Episode, MatchPlan

_LOST = (RayActorError, ObjectLostError)  # the actor is gone, or its machine with what lay there
_PULSE = 1.0  # seconds between two looks at the cluster's head
_IN_VAIN = 10  # deaths in a row, over all actors, without a group between them, that end the run


@dataclass(eq=False)
class _Seat:
    """One actor's place. Those that sit there follow one another."""

    number: int
    actor: Any  # Ray's handle
    up: bool = True
    given: list[asyncio.Future[Any]] = field(default_factory=list)  # weights sent and not there yet
    work: int = 0  # matches out
    coming: asyncio.Task[None] | None = None  # who takes a dead one's place

    def give(self, sent: Awaitable[None]) -> None:
        """What is sent must be there before the actor's next match."""
        waiting = [given for given in self.given if not given.done() or given.exception()]
        self.given = [*waiting, _heard(asyncio.ensure_future(sent))]


@dataclass(eq=False, slots=True)
class _Parcel:
    """The weights of a policy: what was broadcast stays in this process until somebody lacks it."""

    version: int
    adapter: Adapter | None  # without its tensors; None: whole weights
    buckets: list[Bucket] = field(default_factory=list)  # of tensors
    refs: list[Any] = field(default_factory=list)  # to buckets in the object store

    def stored(self) -> list[Any]:
        """All of it in the object store."""
        self.refs += [ray.put(bucket) for bucket in self.buckets]
        self.buckets = []
        return self.refs


class RayCrew:
    """Plays on `cluster.actors` actors. What is measured is played in this process, by `engine`."""

    def __init__(
        self, config: RunConfig, engine: Engine, past: PastSelves | None, judges: Mapping[str, Judge]
    ) -> None:
        """`judges` are those of this process; each actor opens its own.

        Starts the actors. Raises UserError where there is no Ray, no cluster, or no room on it, and what
        an actor raises that cannot open the run's parts on its machine.
        """
        self.config, self.engine, self.past, self.judges = config, engine, past, judges
        self._judged = dict.fromkeys(judges, Stats())  # by actors
        self._cluster = config.cluster
        self._own = connect(self._cluster)
        self._address: str = ray.get_runtime_context().gcs_address
        self._gone = False  # the cluster: Ray is not to be asked for anything any more
        self._broadcasts = Broadcasts(config)
        try:
            self._group = place(self._cluster)
            self._seats = [_Seat(i, self._start(i)) for i in range(self._cluster.actors)]
            for opened in [self._open(seat.actor) for seat in self._seats]:
                try:
                    ray.get(opened)
                except RayTaskError as e:
                    raise _cause(e) from e
                except RayActorError as e:
                    raise UserError(f"a rollout actor died before it was ready: {_brief(e)}") from e
        except BaseException:
            self._leave()
            raise
        self._parcels: dict[str, _Parcel] = {}
        self._past: set[str] = set()  # past selves whose weights are with the actors
        self._deaths, self._again, self._vain, self._last = 0, 0, 0, ""

    # ------------------------------------------------------------------ matches

    async def play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
        """Play all plans; episodes in the order of the plans, each exactly once."""
        found: dict[int, Episode] = {}
        names = {group: i for i, group in enumerate(dict.fromkeys(plan.group for plan in plans))}
        seats = len(self._seats)
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch())
                dealt = []
                for seat in self._seats:
                    share = [plan for plan in plans if names[plan.group] % seats == seat.number]
                    if share:
                        dealt.append(tasks.create_task(self._share(seat, share, found)))
                await asyncio.gather(*dealt)
                watch.cancel()
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several
        return [found[plan.episode] for plan in plans]

    async def _share(self, home: _Seat, plans: Sequence[MatchPlan], found: dict[int, Episode]) -> None:
        """Have `plans` played by the actor of `home`, or others where that dies, until all are `found`."""
        while left := [plan for plan in plans if plan.episode not in found]:
            seat = await self._at_hand(home)
            actor = seat.actor
            seat.work += len(left)
            try:
                await asyncio.gather(*seat.given)
                async for arrived in actor.play.options(num_returns="streaming").remote(left):
                    came, judged = await arrived
                    for episode in came:
                        assert episode.id not in found, f"match {episode.id} came back twice"
                        found[episode.id] = episode
                    for name, stats in judged.items():
                        self._judged[name] += stats
                    self._vain = 0
            except _LOST as e:
                self._lost(seat, actor, e)
                self._again += sum(plan.episode not in found for plan in left)
            except RayTaskError as e:
                raise _cause(e) from e
            finally:
                seat.work -= len(left)

    async def _watch(self) -> None:
        """Raise UserError when the cluster goes."""
        while True:
            await asyncio.sleep(_PULSE)
            await asyncio.to_thread(self._check)

    def _check(self) -> None:
        """Raise UserError where the cluster is gone."""
        try:
            check_alive(self._address)
        except UserError:
            self._gone = True
            raise

    async def _at_hand(self, home: _Seat) -> _Seat:
        """`home`, if somebody sits there, else the least busy of the others, else whoever comes first."""
        while True:
            if home.up:
                return home
            if up := self._up():
                return min(up, key=lambda seat: seat.work)
            coming = [seat.coming for seat in self._seats if seat.coming is not None]
            done, _ = await asyncio.wait(
                coming, timeout=self._cluster.patience, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()  # raises what keeps an actor from opening
            if not done:
                raise UserError(
                    f"no rollout actor came back within cluster.patience = {self._cluster.patience:g} s; the "
                    f"last one died so: {self._last}. What was done is kept: mend the cluster, and --resume"
                )

    # ------------------------------------------------------------------ weights

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """Send new weights to all actors and put them into this process's engine.

        What is played later begins with them: an actor gets no match before the weights that were sent first.
        """
        self._check()
        self.engine.load(policy, weights, version)
        if self._broadcasts.backend is None:
            self._send(policy, self._put(weights, version))
            return
        adapter, tensors = _apart(weights)
        actors = [seat.actor for seat in self._up()]
        buckets, have = self._broadcasts.send(actors, policy, version, adapter, tensors)
        self._send(policy, _Parcel(version, adapter, buckets), have)

    def bring(self, run: Path) -> None:
        """Have the actors hold the weights of exactly those past selves whose matches have begun."""
        if self.past is None:
            return
        self._check()
        wanted = set(self.past.at_table)
        for policy in sorted(self._past - wanted):
            for name in self.past.me.named(policy).policies:
                del self._parcels[name]
                for seat in self._up():
                    seat.give(seat.actor.unload.remote(name))
        for policy in sorted(wanted - self._past):
            for name, weights in past_weights(self.past.me, run, policy).items():
                self._send(name, self._put(weights, int(policy.removeprefix(PAST))))
        self._past = wanted

    def _put(self, weights: PolicyWeights, version: int) -> _Parcel:
        """Weights in the object store, as they are now."""
        adapter, tensors = _apart(weights)
        size = self._cluster.bucket_mib * 2**20
        return _Parcel(version, adapter, refs=[ray.put(bucket) for bucket in pack(tensors, size)])

    def _send(self, policy: str, parcel: _Parcel, have: Sequence[Any] = ()) -> None:
        """Keep `parcel` for who comes later, and send it to all actors but those that `have` it."""
        self._parcels[policy] = parcel
        for seat in self._up():
            if seat.actor not in have:
                seat.give(self._load(seat.actor, policy))

    def _load(self, actor: Any, policy: str) -> Awaitable[None]:
        parcel = self._parcels[policy]
        sent: Awaitable[None] = actor.load.remote(policy, parcel.version, parcel.adapter, *parcel.stored())
        return sent

    def _up(self) -> list[_Seat]:
        """Where somebody sits. Who comes to another gets everything then."""
        return [seat for seat in self._seats if seat.up]

    # ------------------------------------------------------------------ actors

    def _start(self, number: int) -> Any:
        cluster = self._cluster
        place = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=cluster.learners + number
        )
        return (
            ray.remote(RolloutActor)
            .options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, scheduling_strategy=place)
            .remote()
        )

    def _open(self, actor: Any) -> Any:
        config = self.config
        if not self._cluster.gpus:
            config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        # A file of verdicts has one writer, which is this process.
        judges = {
            name: judge.model_copy(update={"cache_file": None}) for name, judge in config.judges.items()
        }
        config = config.model_copy(update={"judges": judges})
        share = -(-config.rollout.in_flight // self._cluster.actors)
        return actor.open.remote(config.model_dump(mode="json"), share)

    def _lost(self, seat: _Seat, actor: Any, error: Exception) -> None:
        """Somebody saw that `actor` is gone: have another take its place. Only the first to see it counts."""
        if seat.actor is not actor or not seat.up:
            return
        self._check()
        self._deaths, self._vain, self._last = self._deaths + 1, self._vain + 1, _brief(error)
        if self._vain >= _IN_VAIN:
            raise UserError(
                f"{self._vain} rollout actors died one after another and no match came back in between; the "
                f"last one so: {self._last}. What was done is kept: mend the cause, and go on with --resume"
            ) from error
        seat.up = False
        seat.given = []
        ray.kill(actor)  # where it was only out of reach: it must not come back
        seat.coming = _heard(asyncio.create_task(self._replace(seat)))

    async def _replace(self, seat: _Seat) -> None:
        """Start another actor, as often as it takes, and give it all weights as they are by then."""
        while True:
            actor = self._start(seat.number)
            try:
                await self._open(actor)
                known: dict[str, _Parcel] = {}
                while known != self._parcels:
                    for policy in known.keys() - self._parcels.keys():
                        await actor.unload.remote(policy)
                    new = dict(self._parcels)
                    for policy in [p for p in new if new[p] is not known.get(p)]:
                        await self._load(actor, policy)
                    known = new
            except RayActorError as e:
                self._deaths, self._last = self._deaths + 1, _brief(e)
                await asyncio.sleep(1.0)
                self._check()
            except RayTaskError as e:
                cause = _cause(e)
                self._last = f"nobody takes its place: {cause}"
                raise cause from e
            else:
                seat.actor, seat.up = actor, True
                return

    # ------------------------------------------------------------------ the rest

    def judged(self) -> dict[str, Stats]:
        """What each judge has done so far: here, and with the actors, so far as these have told."""
        return {name: judge.stats() + self._judged[name] for name, judge in self.judges.items()}

    def report(self) -> dict[str, Any]:
        """For the step's record: actors that are up; deaths, and matches played again, since the last one;
        and while a place is empty, or somebody has died, of what.
        """
        said: dict[str, Any] = {
            "actors": len(self._up()),
            "deaths": self._deaths,
            "played_again": self._again,
        }
        if self._deaths or len(self._up()) < len(self._seats):
            said["last_death"] = self._last
        self._deaths, self._again = 0, 0
        return {"crew": said | self._broadcasts.report()}

    def close(self) -> None:
        """Let the actors go, and the cluster where it is our own."""
        self._leave()

    def _leave(self) -> None:
        if hasattr(self, "_broadcasts"):
            self._broadcasts.close()
        if not ray.is_initialized() or getattr(self, "_gone", False):
            return
        for seat in getattr(self, "_seats", []):
            ray.kill(seat.actor)
        if hasattr(self, "_group") and not placed():  # else it is not ours
            remove_placement_group(self._group)
        if self._own:
            ray.shutdown()


def _apart(weights: PolicyWeights) -> tuple[Adapter | None, Mapping[str, Tensor]]:
    """An adapter without its tensors, if it is one; and the tensors."""
    if isinstance(weights, Adapter):
        return replace(weights, tensors={}), weights.tensors
    return None, weights


T = TypeVar("T", bound=asyncio.Future[Any])


def _heard(future: T) -> T:
    """The same, whose error is no news where nobody waits for it any more."""
    future.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
    return future


def _cause(e: RayTaskError) -> BaseException:
    """What was raised in the actor, as it was raised."""
    return e.cause if isinstance(e.cause, BaseException) else e


def _brief(e: Exception) -> str:
    """The sentence of Ray's long text that tells why."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("The actor is dead because")]
    return (told or lines or [type(e).__name__])[0][:300]

"""The policies that a run trains: a learner for each, and their way into the engine and onto the disk.

Mostly it is one, called "self", that plays every role. Where the recipe has several (`[[policies]]`), rows go
to the learner of the policy whose role they are; everybody else knows the several as one player, "self". One
policy is written as a model directory, several as a directory with one of each name in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ludus.config import RunConfig
from ludus.engines.base import Adapter, PolicyWeights
from ludus.errors import UserError
from ludus.games.base import Game
from ludus.league.seating import check_roles
from ludus.learner.adapters import attach, base_facts, peft_name, put, read, save
from ludus.learner.learner import Learner, NonFinite
from ludus.learner.model import save_model
from ludus.model_files import is_adapter
from ludus.players import LanguagePlayer
from ludus.seeding import derive
from ludus.train.assemble import BASE, open_matching, open_model, open_player, open_supervised, starts
from ludus.train.ranks import ALONE, Ranks
from ludus.types import Sample

JUDGED = "judged"  # the player whose weights are those that are measured
LEARNER = "learner"  # what the one learner's file is called


class Policies:
    """What learns in a run. `player` plays as the policies are now; it is the one called "self"."""

    def __init__(
        self, config: RunConfig, games: Mapping[str, Game], tell: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        """`tell` hears what the user should know before the first step.

        Raises UserError for models that cannot be had, fit or be trained, and roles that do not add up.
        """
        check_roles(config, games)
        model = open_model(config)
        self.player = open_player(config, model, trainable=True)
        models = dict(zip(self.player.policies, _models(config, model), strict=True))
        self.supervised = open_supervised(config, model, self.player.prompter, list(models), tell)
        self.device = model.device
        self._home, self._adapter = Path(config.model.path), config.adapter
        self._base = base_facts(self._home) if config.adapter is not None else None
        rates = {policy.name: policy.lr for policy in config.policies if policy.lr is not None}
        self.learners = {
            name: Learner(
                model,
                config.loss,
                config.optim.model_copy(update={"lr": rates[name]}) if name in rates else config.optim,
                max_tokens=config.rollout.max_tokens,
                total_steps=config.train.steps,
                temperature=config.rollout.temperature,
                top_p=config.rollout.top_p,
                top_k=config.rollout.top_k,
                seed=derive(config.seed, "learner", *([name] if len(models) > 1 else [])),
                supervised=self.supervised.get(name),
                placement=ranks.placement(model.device),
            )
            for name, model in models.items()
        }

    @property
    def data(self) -> dict[str, str]:
        """A digest of the supervised rows of each policy that has any."""
        return {name: supervised.digest for name, supervised in self.supervised.items()}

    @property
    def several(self) -> bool:
        return len(self.learners) > 1

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One update of every policy on its own rows; what `Learner.update` measured, by name of several.

        Raises NonFinite.
        """
        if not self.several:
            (learner,) = self.learners.values()
            return learner.update(samples)
        return {
            name: learner.update([s for s in samples if self.player.policy_of(s.game, s.role) == name])
            for name, learner in self.learners.items()
        }

    def weights(self) -> dict[str, PolicyWeights]:
        """The weights as they are, by the ids that they have in the engine."""
        return {
            policy: self._for_engine(learner.weights())
            for policy, learner in zip(self.player.policies, self.learners.values(), strict=True)
        }

    def hand_over_judged(self, version: int) -> LanguagePlayer:
        """Put the weights that a checkpoint ships into the engine, beside; the player that has them."""
        judged = self.player.named(JUDGED)
        for policy, learner in zip(judged.policies, self.learners.values(), strict=True):
            judged.engine.load(policy, self._for_engine(learner.average_weights()), version)
        return judged

    def _for_engine(self, weights: Mapping[str, Tensor]) -> PolicyWeights:
        if self._adapter is None:
            return weights
        tensors = {peft_name(name): tensor for name, tensor in weights.items()}
        return Adapter(BASE, self._adapter.rank, self._adapter.alpha, tensors)

    def writer(self, *, average: bool) -> Callable[[Path], None]:
        """Take the weights as they play, or their moving `average` where one is kept; what comes back writes
        them into a directory, as model directories or as adapters of model.path.
        """
        taken = {
            name: learner.average_weights() if average else learner.weights()
            for name, learner in self.learners.items()
        }

        def write(directory: Path) -> None:
            for name, weights in taken.items():
                where = directory / name if self.several else directory
                if self._adapter is None or self._base is None:
                    save_model(self.learners[name].model, where, like=self._home, weights=weights)
                else:
                    tensors = {peft_name(n): tensor for n, tensor in weights.items()}
                    save(tensors, where, self._adapter, self._base)

        return write

    def check_finite(self, step: int) -> None:
        """Raise NonFinite where a weight is NaN or infinite."""
        for learner in self.learners.values():
            refuse_infinite(step, learner.weights())

    def state(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that the next update depends on: tensors by name of a file ("learner", or the policies' names),
        and plain JSON, in which the digests of an adapter's base stand for the base.

        Raises NonFinite where a weight or a moment is NaN or infinite.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Any] = {}
        for name, learner in self.learners.items():
            file = name if self.several else LEARNER
            tensors[file], values[file] = learner.state()
            refuse_infinite(step, tensors[file])
            if self._base is not None:
                values[file]["base"] = self._base["digests"]
        return tensors, values if self.several else values[LEARNER]

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Become what `state` was taken from. Raises UserError where it does not fit."""
        for name, learner in self.learners.items():
            file, own = (name, values[name]) if self.several else (LEARNER, values)
            if self._base is not None and own["base"] != self._base["digests"]:
                raise UserError(
                    f"the model in {self._home} (model.path) is no longer the one that the adapters of this "
                    "run change: put its files back as they were, or start anew with another --out"
                )
            learner.load_state(tensors[file], own)


def _models(config: RunConfig, model: PreTrainedModel) -> list[PreTrainedModel]:
    """One to train for each policy: `model` itself for the first that starts there; or its adapters."""
    found: list[PreTrainedModel] = []
    for number, start in enumerate(starts(config)):
        if start is not None and is_adapter(start) != (config.adapter is not None):
            raise UserError(
                f"policies: {start} holds {'an adapter' if is_adapter(start) else 'a whole model'}, but the "
                f"recipe trains {'adapters' if config.adapter else 'whole models'}; "
                + (
                    "leave [adapter] out"
                    if config.adapter
                    else "write [adapter], or merge it (ludus export --merge)"
                )
            )
        if config.adapter is not None:
            found.append(attach(model, config.adapter, derive(config.seed, "adapter", number)))
            if start is not None:
                put(found[-1], read(start, BASE), start)
        elif start is not None:
            found.append(open_matching(config, start, "policies", model.device))
        else:
            found.append(copy.deepcopy(model) if model in found else model)
    return found


def refuse_infinite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFinite where a weight or a moment is NaN or infinite.

    A finite gradient at an absurd learning rate gets there without the learner noticing.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFinite(
                f"after step {step}, {name} is not finite: no checkpoint or snapshot of this step was "
                "written. Lower optim.lr and start again, from the last checkpoint's model if it is of use"
            )

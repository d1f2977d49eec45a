"""The parts of a run, put together as its configuration says: what training and measuring share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ludus.config import PAST, ModelConfig, RunConfig
from ludus.engines.base import Adapter, Engine
from ludus.engines.openai_engine import OpenAIEngine
from ludus.engines.torch_engine import TorchEngine
from ludus.engines.vllm_engine import VllmEngine
from ludus.errors import UserError
from ludus.experts import Choosy, make_player
from ludus.experts import names as program_names
from ludus.games import registry
from ludus.games.base import Game, judges_of
from ludus.judges.make import open_judges
from ludus.league.matchmaker import SELF
from ludus.league.population import past_id
from ludus.league.seating import parts
from ludus.learner.adapters import check_base, read
from ludus.learner.device import resolve_device
from ludus.learner.model import check_context, load_model
from ludus.learner.supervised import Supervised
from ludus.model_files import ADAPTER_FILE, is_adapter, read_json
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import HouseRules
from ludus.rollout.scheduler import Play, play_all
from ludus.seeding import derive
from ludus.sft import encode
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.truth.evaluate import measure
from ludus.types import Sampling

BASE = "the base of all adapters"  # the policy id, in the engine, of the model that adapters change

# What two models of one architecture may differ in: names, and how they were saved.
_HARMLESS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def open_games(config: RunConfig) -> dict[str, Game]:
    """The games of the mix by label."""
    return {game.label: registry.make(game.name, **game.args) for game in config.games}


def open_model(config: RunConfig) -> PreTrainedModel:
    """The model on its device; sets torch's threads first. Raises UserError if it cannot be had or fit."""
    model = read_model(config.model, config.threads)
    check_context(model, config.engine.context)
    return model


def read_model(config: ModelConfig, threads: int) -> PreTrainedModel:
    """The same, for whatever context."""
    if threads:
        torch.set_num_threads(threads)
    device = resolve_device(config.device)
    trust = config.trust_remote_code
    model = load_model(Path(config.path), config.dtype, device, trust_remote_code=trust)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} has no gradient checkpointing; leave it off")
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    return model


def open_prompter(config: RunConfig, tokenizer: Tokenizer, template: str = "auto") -> Prompter:
    """What turns observations into prompts, as the run's `text` section says."""
    return Prompter(
        tokenizer,
        detect(tokenizer, template),
        context=config.text.context,
        rules=config.text.rules,
        think=config.text.think,
        stop_on_action=config.text.stop_on_action,
        format=config.text.format,
    )


def open_player(config: RunConfig, model: PreTrainedModel, *, trainable: bool = False) -> LanguagePlayer:
    """The player "self" on an engine of its own: `model`, or the recipe's several policies, of version 0.

    A policy that names no directory of its own starts as `model`. Raises UserError for one that does not fit.
    """
    prompter = open_prompter(config, Tokenizer.load(Path(config.model.path)), config.model.template)
    engine = open_engine(config, model)
    rollout = config.rollout
    sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    roles = parts(config.policies, open_games(config)) if config.policies else {}
    player = LanguagePlayer(SELF, engine, prompter, sampling, trainable, roles)
    if _has_adapters(config):
        engine.load(BASE, model.state_dict(), version=0)
        if config.adapter is not None and isinstance(engine, TorchEngine):
            _share(model, engine.lend(BASE))
    for policy, start in zip(player.policies, starts(config), strict=True):
        if start is not None:
            load_frozen(config, engine, policy, start, f"policy {policy!r}")
        elif config.adapter is not None:  # one that changes nothing yet
            engine.load(policy, Adapter(BASE, config.adapter.rank, config.adapter.alpha, {}), version=0)
        else:
            engine.load(policy, model.state_dict(), version=0)
    return player


def open_engine(config: RunConfig, model: PreTrainedModel) -> Engine:
    """The recipe's engine for models built like this one, without weights."""
    if config.engine.kind == "vllm":
        return VllmEngine(Path(config.model.path), config.engine, _largest_rank(config))
    return TorchEngine(
        model.config,
        slots=config.engine.slots,
        context=config.engine.context,
        device=model.device,
        dtype=getattr(torch, config.engine.dtype),
        matmul=config.engine.matmul,
        threads=config.engine.threads,
        graphs=None if config.engine.graphs else False,
    )


def _share(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Let a model that never learns use the engine's tensors instead of its own, where they are alike."""
    for name, parameter in model.named_parameters():
        other = tensors.get(name)
        if other is not None and (other.dtype, other.device) == (parameter.dtype, parameter.device):
            parameter.data = other


def _has_adapters(config: RunConfig) -> bool:
    """Whether any policy of the run is an adapter of the model."""
    return _largest_rank(config) > 0


def _largest_rank(config: RunConfig) -> int:
    """Of the run's adapters; 0 where it has none."""
    models = [*starts(config), *(Path(o.model) for o in config.league.opponents if o.model is not None)]
    found = [int(read_json(path / ADAPTER_FILE).get("r", 1)) for path in models if path and is_adapter(path)]
    return max([*found, config.adapter.rank if config.adapter is not None else 0])


def load_frozen(config: RunConfig, engine: Engine, policy: str, path: Path, who: str) -> None:
    """Have `engine` hold the model or the adapter in `path`. Raises UserError unless it fits model.path."""
    if is_adapter(path):
        check_base(path, Path(config.model.path), who)
        engine.load(policy, read(path, BASE), version=0)
    else:
        engine.load(policy, open_matching(config, path, who).state_dict(), version=0)


def starts(config: RunConfig) -> list[Path | None]:
    """Where each trained policy starts, in the recipe's order; None: at model.path."""
    return [None if p.model is None else Path(p.model) for p in config.policies] or [None]


def open_opponents(config: RunConfig, me: LanguagePlayer, *, league: bool = True) -> dict[str, Player]:
    """The league's opponents and the anchors of the evaluation by policy id, none of them trained.

    Without `league`, only those that the evaluation names. Past selves are left out: see `train/past.py`.

    Frozen models share the engine of `me` and are read at the same temperature. Raises UserError for an
    unknown program, a model that does not fit `me`'s engine or tokenizer, and a missing API key.
    """
    players: dict[str, Player] = {}
    for opponent in config.league.opponents:
        if opponent.policy.startswith(PAST):
            continue
        if not league and opponent.policy not in config.eval.opponents:
            continue
        if opponent.endpoint is not None:
            remote = OpenAIEngine(opponent.endpoint)
            players[opponent.policy] = replace(me.alone(opponent.policy), engine=remote)
        elif opponent.model is not None:
            if opponent.policy in program_names():
                raise UserError(
                    f"opponent {opponent.policy!r} has a program's name but a model of its own; rename it"
                )
            load_frozen(
                config, me.engine, opponent.policy, Path(opponent.model), f"opponent {opponent.policy!r}"
            )
            players[opponent.policy] = me.alone(opponent.policy)
        else:
            players[opponent.policy] = make_player(opponent.policy)
    rest = [x for x in config.eval.opponents if x not in players and not x.startswith(PAST)]
    return players | {name: make_player(name) for name in rest}


def open_matching(
    config: RunConfig, path: Path, who: str, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model in `path`. Raises UserError unless it can share an engine with that of model.path."""
    home = Path(config.model.path)
    if not Tokenizer.load(path).same_as(Tokenizer.load(home)):
        raise UserError(
            f"{who}: the tokenizer in {path} is not that of {home}, and they would share an engine; an "
            "opponent with another one can be served behind an endpoint instead"
        )
    trust = config.model.trust_remote_code
    model = load_model(path, config.model.dtype, device, trust_remote_code=trust)
    trained = AutoConfig.from_pretrained(home, local_files_only=True, trust_remote_code=trust).to_dict()
    found = model.config.to_dict()
    different = [k for k in sorted(trained.keys() | found.keys()) if trained.get(k) != found.get(k)]
    if wrong := [k for k in different if k not in _HARMLESS]:
        raise UserError(
            f"{who}: the model in {path} is built otherwise than {home} ({', '.join(wrong)}), and they would "
            "share an engine; an opponent of another kind can be served behind an endpoint instead"
        )
    return model


def check_opponents(config: RunConfig, games: Mapping[str, Game], players: Mapping[str, Player]) -> None:
    """Raise UserError unless league players can play all that they are to, and each anchor some game."""

    def unable(name: str, labels: Iterable[str]) -> list[str]:
        player = players[name]
        return [x for x in labels if isinstance(player, Choosy) and not player.plays(games[x])]

    for opponent in config.league.opponents:
        if opponent.policy not in players:
            continue  # a past self plays everything
        if wrong := unable(opponent.policy, opponent.games or games):
            raise UserError(
                f"league.opponents: {opponent.policy!r} cannot play {', '.join(wrong)}; name the games that "
                "it plays (games = [...]), or leave it out"
            )
    for name in config.eval.opponents:
        if name.startswith(PAST) and name != past_id(0):
            raise UserError(
                f"eval.opponents: {name!r} is not there from a run's beginning to its end; past/0 is, and "
                f"ludus eval RUN 'eval.opponents=[\"{name}\"]' measures against the others"
            )
        if name in players and len(unable(name, games)) == len(games):
            raise UserError(f"eval.opponents: {name!r} cannot play {', '.join(games)}; leave it out")


def open_supervised(
    config: RunConfig,
    model: PreTrainedModel,
    prompter: Prompter,
    policies: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, Supervised]:
    """The rows that each policy is trained on beside self-play, if any; `tell` hears how many.

    Raises UserError.
    """
    if not config.sft.data:
        return {}
    context = config.sft.context or config.engine.context
    check_context(model, context, "sft.context")
    return encode.open_supervised(
        config.sft, policies, encode.Encoder(prompter.tokenizer, prompter.template), context, tell
    )


def house_rules(config: RunConfig, games: Mapping[str, Game]) -> HouseRules:
    """What is settled outside the games of this run; opens the judges that they ask.

    Raises UserError for judges that are not described, that cannot be made or cannot say what is paid for.
    """
    asked = {label: judges_of(game) for label, game in games.items()}
    judges = open_judges(config.judges, asked)
    return HouseRules(config.rollout.retries, config.rollout.forfeit, judges)


async def measure_player(
    config: RunConfig,
    games: Mapping[str, Game],
    player: LanguagePlayer,
    opponents: Mapping[str, Player],
    rule: HouseRules,
    matches: int,
    play: Play = play_all,
) -> dict[str, Any]:
    """The truth about `player`, as the run's `eval` section asks for it; deals depend on the run's seed.

    `opponents` holds, among others, those that the section names.
    """
    return await measure(
        games,
        player,
        {name: opponents[name] for name in config.eval.opponents},
        matches=matches,
        exploitability=config.eval.exploitability,
        thoughts=config.eval.thoughts,
        seed=derive(config.seed, "eval"),
        rule=rule,
        in_flight=config.rollout.in_flight,
        play=play,
    )

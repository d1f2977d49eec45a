"""From a word on the command line to a model that is asked plain questions: a run, a model, or an endpoint.

PATH            a run directory (its newest whole checkpoint), or a model directory
URL#MODEL       a model behind an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1#qwen3
NAME=URL#MODEL  the same; its key is read from NAME_API_KEY where that variable is set
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ludus import config as configuration
from ludus import contest, measuring
from ludus.config import RunConfig
from ludus.model_files import digests
from ludus.players import LanguagePlayer
from ludus.truth.subject import Subject


def settings(
    word: str, recipe: Path | None, overrides: Sequence[str], temperature: float
) -> tuple[RunConfig, dict[str, Any]]:
    """The settings of a model, and as plain data what makes its answers what they are.

    Without a recipe it is sampled at `temperature` from the whole distribution, with room for an answer.
    Raises UserError.
    """
    if _remote(word):
        ours = [f"rollout.max_tokens={measuring.ASKED_TOKENS}", f"rollout.temperature={temperature}"]
        ours.append(f"engine.context={2 * measuring.ASKED_TOKENS}")  # the configuration wants room; unused
        plain = {"name": "eval", "model": {"path": "none"}, "games": [{"name": "kuhn_poker"}]}
        if recipe is not None:
            plain, ours = configuration.load(recipe).model_dump(mode="json"), []
        config = configuration.validate(configuration.override(plain, [*ours, *overrides]), "settings")
        return config, {"url": word, **_speech(config)}
    target = measuring.find_asked(Path(word), recipe, overrides, temperature)
    config = target.config
    return config, {
        "files": digests(target.model),
        "template": config.model.template,
        "engine": config.engine.model_dump(include={"dtype", "context", "matmul"}),
        **_speech(config),
    }


def open_subject(word: str, config: RunConfig) -> Subject:
    """The model that `settings` describes. Raises UserError; whoever opened it closes its engine."""
    if _remote(word):
        name, eq, _ = word.partition("=")
        entrant = contest.open_entrant(word if eq and "://" not in name else f"model={word}", config, None)
        player, context = entrant.player, None
        assert isinstance(player, LanguagePlayer)
    else:
        from ludus.train.assemble import open_model, open_player  # loads torch: bad input is told before

        player, context = open_player(config, open_model(config)), config.engine.context
    return Subject(player.sole, player.engine, player.prompter, player.sampling, context)


def run_of(word: str) -> Path | None:
    """The run directory that a model lies in, if any."""
    return None if _remote(word) else measuring.enclosing_run(Path(word))


def _remote(word: str) -> bool:
    return "://" in word


def _speech(config: RunConfig) -> dict[str, Any]:
    sampled = {"max_tokens", "temperature", "top_p", "top_k"}
    return {
        "think": config.text.think,
        "format": config.text.format,
        "sampling": config.rollout.model_dump(include=sampled),
    }

"""What every engine of ours asks of a request before it takes it."""

from __future__ import annotations

from collections.abc import Sequence

from ludus.engines.base import TooLong
from ludus.errors import UserError
from ludus.types import Request


def check_request(request: Request, *, vocab: int, context: int, coldest: float) -> None:
    """Raise UserError for a request that a model of `vocab` ids and `context` positions cannot answer, which
    is TooLong where its prompt is.

    `coldest` is the lowest temperature above 0 that the engine can divide by.
    """
    sampling = request.sampling
    check_ids("prompt", request.prompt_ids, vocab)
    if not request.prompt_ids:
        raise UserError("the prompt is empty; it needs at least one token")
    if sampling.max_tokens < 1:
        raise UserError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
    if len(request.prompt_ids) + sampling.max_tokens > context:
        raise TooLong(
            f"a prompt of {len(request.prompt_ids)} tokens and max_tokens = {sampling.max_tokens} need "
            f"{len(request.prompt_ids) + sampling.max_tokens} positions, but engine.context is "
            f"{context}; raise engine.context or lower max_tokens"
        )
    stop = request.stop
    check_ids("stop rule", [*stop.ids, *stop.triggers], vocab)
    if not 0 <= request.seed < 2**63:
        raise UserError(f"a request has seed {request.seed}; it must lie in 0 .. 2**63 - 1")
    if not (sampling.temperature == 0 or sampling.temperature >= coldest):
        raise UserError(f"temperature is {sampling.temperature}; use 0 for greedy or at least {coldest}")
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise UserError(
            f"top_p is {sampling.top_p} and top_k {sampling.top_k}; top_p must lie in (0, 1], "
            "and top_k must not be negative"
        )


def check_pairs(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, vocab: int, context: int
) -> None:
    """Raise UserError for pairs that cannot be scored by such a model."""
    if len(prompts) != len(continuations):
        raise UserError(f"{len(prompts)} prompts but {len(continuations)} continuations to score")
    for prompt, continuation in zip(prompts, continuations, strict=True):
        check_ids("prompt", prompt, vocab)
        check_ids("continuation", continuation, vocab)
        if not prompt:
            raise UserError("a prompt to score is empty; it needs at least one token")
        if len(prompt) + len(continuation) > context:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and a continuation of {len(continuation)} need "
                f"{len(prompt) + len(continuation)} positions, but engine.context is {context}; "
                "raise engine.context"
            )


def check_ids(what: str, ids: Sequence[int], vocab: int) -> None:
    """Raise UserError for ids that the model does not embed."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab):
        raise UserError(
            f"a {what} has token ids from {min(ids)} to {max(ids)}, the model knows 0 to "
            f"{vocab - 1}; take the tokenizer that belongs to the model"
        )

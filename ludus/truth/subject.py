"""A model that is asked plain questions, outside any game."""

from __future__ import annotations

from dataclasses import dataclass

from ludus.engines.base import Engine, EngineUnavailable
from ludus.text.prompter import Prompter
from ludus.truth.transcripts import Answer
from ludus.types import Request, Sampling, Stop, StopRule


@dataclass(frozen=True, slots=True)
class Subject:
    """A plain user message goes in, what the model says after its thought comes out.

    In the format "answer" the message ends with a line that asks for it, and what comes out is what stands in
    its tags.
    """

    policy: str
    engine: Engine
    prompter: Prompter
    sampling: Sampling
    context: int | None  # tokens of prompt and reply together; None: a server's own affair

    async def answer(self, prompt: str, seed: int) -> Answer:
        """The answer, or why there is none: "prompt_too_long", "no_answer", or the engine's own reason."""
        asked = self.prompter.plain(prompt)
        if self.context is not None and len(asked.ids) + self.sampling.max_tokens > self.context:
            return Answer(None, "prompt_too_long")
        stop = StopRule(ids=self.prompter.template.end_ids)
        request = Request(self.policy, asked.ids, seed, self.sampling, stop, messages=asked.messages)
        try:
            completion = await self.engine.generate(request)
        except EngineUnavailable as e:
            return Answer(None, e.reason)
        cut = completion.stop is Stop.LENGTH
        if completion.text is not None:  # an engine that speaks text only
            text = self.prompter.spoken_text(completion.text)
        else:
            text = self.prompter.spoken(completion.ids)
        if text is None or not text.strip():
            return Answer(None, "no_answer", cut)  # the thought never ended, or nothing came after it
        return Answer(text.strip(), cut=cut)

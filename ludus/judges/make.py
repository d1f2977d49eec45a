"""The judge that a configuration describes."""

from __future__ import annotations

from ludus.config import JudgeConfig
from ludus.judges.base import Judge
from ludus.judges.chat import ChatJudge


def make_judge(config: JudgeConfig) -> Judge:
    """Raises UserError for a missing API key, a directory without a classifier, an unusable cache file."""
    if config.kind == "chat":
        return ChatJudge(config)
    from ludus.judges.classifier import ClassifierJudge  # loads torch, which a chat judge does not need

    return ClassifierJudge(config)

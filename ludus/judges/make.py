"""The judge that a configuration, or a file of one, describes."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import ValidationError

from ludus.config import JudgeConfig
from ludus.errors import UserError
from ludus.judges.base import Judge
from ludus.judges.chat import ChatJudge


def make_judge(config: JudgeConfig) -> Judge:
    """Raises UserError for a missing API key, a directory without a classifier, an unusable cache file."""
    if config.kind == "chat":
        return ChatJudge(config)
    from ludus.judges.classifier import ClassifierJudge  # loads torch, which a chat judge does not need

    return ClassifierJudge(config)


def load_config(path: Path) -> JudgeConfig:
    """The settings in a TOML file whose keys are those of JudgeConfig. Raises UserError."""
    try:
        return JudgeConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise UserError(f"cannot read judge {path}: {e.strerror}") from e
    except ValidationError as e:
        problems = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}".lstrip(": ") for x in e.errors()]
        raise UserError(
            f"judge {path}: {'; '.join(problems)}; JudgeConfig in ludus/config.py has all keys"
        ) from e
    except ValueError as e:
        raise UserError(f"judge {path} is not valid TOML: {e}") from e

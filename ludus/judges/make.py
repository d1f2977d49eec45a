"""The judge that a configuration, or a file of one, describes."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from ludus.config import JudgeConfig
from ludus.errors import UserError
from ludus.judges.base import FIELDS, Judge
from ludus.judges.chat import ChatJudge


def make_judge(config: JudgeConfig) -> Judge:
    """Raises UserError for a missing API key, a directory without a classifier, an unusable cache file."""
    if config.kind == "chat":
        return ChatJudge(config)
    from ludus.judges.classifier import ClassifierJudge  # loads torch, which a chat judge does not need

    return ClassifierJudge(config)


def open_judges(known: Mapping[str, JudgeConfig], asked: Mapping[str, Sequence[str]]) -> dict[str, Judge]:
    """The judges that games ask, by name. `asked` has the names of each game: who pays, then others.

    Raises UserError for a judge that is not described, for one that pays and cannot say what is paid for, and
    where one cannot be made.
    """
    check_judges(known, asked)
    wanted = dict.fromkeys(name for names in asked.values() for name in names)
    return {name: make_judge(known[name]) for name in wanted}


def check_judges(known: Mapping[str, JudgeConfig], asked: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError for a judge that is not described, and for one that pays without saying all."""
    for game, names in asked.items():
        check_names(game, names, known)
        for name in names[:1]:
            if lacking := [field for field in FIELDS if field not in says(known[name])]:
                raise UserError(
                    f"{game} is paid by the judge {name!r}, which never says {' and '.join(lacking)}, so no "
                    "match could be paid; take one that says all, such as of format wildguard, or qwen3guard "
                    "with both"
                )


def check_names(game: str, names: Iterable[str], known: Mapping[str, object]) -> None:
    """Raise UserError unless all judges that a game asks are known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"describe it in [judges.{name}]"
            raise UserError(f"{game} is judged by {name!r}, and there is no such judge here; {hint}")


def says(config: JudgeConfig) -> frozenset[str]:
    """The fields of its verdicts that a judge fills in, of a request and its answer."""
    if config.kind == "classifier":
        return frozenset(config.labels)
    found = set(FIELDS)
    if config.format == "llama_guard":
        found.discard("refusal")
    if config.format != "wildguard" and not config.both:
        found.discard("request_harmful")
    return frozenset(found)


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

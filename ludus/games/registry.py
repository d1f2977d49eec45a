"""Games by name: those that come with Ludus, and those that other packages register.

A package adds a game through the entry point group `ludus.games`: the entry's name is the game's, its
value a callable that takes the options as keyword arguments and returns a Game. Entries are imported only
when their game is made or described, and one that fails to import hurts no other.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ludus.errors import UserError
from ludus.games.base import Game
from ludus.games.catalogue import GAMES

GROUP = "ludus.games"


@dataclass(frozen=True, slots=True)
class Description:
    """One line of `ludus games ls`. `options` are the arguments with their defaults, as text."""

    name: str
    summary: str
    options: dict[str, str]
    source: str  # "ludus", or the entry point's value
    problem: str | None = None  # why this game cannot be made


def names() -> tuple[str, ...]:
    """Every known game, sorted; imports nothing."""
    return tuple(sorted(GAMES.keys() | _entries().keys()))


def make(name: str, /, **args: Any) -> Game:
    """The game `name` with its options.

    Raises UserError for an unknown name or option (naming the nearest), for an ill-typed option, and for
    a third-party game that cannot be imported or made.
    """
    factory = _factory(name)
    checked = _check_args(name, factory, args)
    if name in GAMES:
        return GAMES[name](**checked)
    try:
        game: Game = factory(**checked)
    except UserError:
        raise
    except Exception as e:  # whatever a third party raises, the user must learn whose fault it is
        raise UserError(f"game {name!r} ({_entries()[name].value}) failed to start: {_said(e)}") from e
    if not callable(getattr(game, "start", None)):
        raise UserError(
            f"game {name!r} ({_entries()[name].value}) returned {type(game).__name__}, which is no Game: "
            "see ludus.games.base.Game"
        )
    return game


def describe() -> list[Description]:
    """Every known game, sorted by name; broken third-party games carry their `problem`."""
    rows = [_describe(name, factory, "ludus") for name, factory in GAMES.items()]
    for name, entry in _entries().items():
        if name in GAMES:
            problem = f"entry point {entry.value} is ignored: Ludus has a game of this name; choose another"
            rows.append(Description(name, "", {}, entry.value, problem))
            continue
        try:
            rows.append(_describe(name, _load(name, entry), entry.value))
        except UserError as e:
            rows.append(Description(name, "", {}, entry.value, str(e)))
    return sorted(rows, key=lambda row: (row.name, row.source != "ludus"))


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _factory(name: str) -> Callable[..., Any]:
    if name in GAMES:
        return GAMES[name]
    entries = _entries()
    if name in entries:
        return _load(name, entries[name])
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known games: {', '.join(names())}"
    raise UserError(f"unknown game {name!r}; {hint}")


def _load(name: str, entry: EntryPoint) -> Callable[..., Any]:
    try:
        factory = entry.load()
    except Exception as e:  # a broken third-party module can raise anything at import
        raise UserError(
            f"game {name!r} cannot be imported from entry point {entry.value}: {_said(e)}; "
            "mend or uninstall the package that registers it"
        ) from e
    if not callable(factory):
        raise UserError(f"game {name!r}: entry point {entry.value} is not callable; it must return a Game")
    return factory  # type: ignore[no-any-return]


def _check_args(name: str, factory: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(factory)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    checked: dict[str, Any] = {}
    for key, value in args.items():
        if key not in known:
            if not takes_any:
                raise UserError(f"game {name!r} has no option {key!r}; {_nearest(key, known)}")
            checked[key] = value
            continue
        checked[key] = _check_value(name, key, parameters[key].annotation, value)
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in args]
    if missing:
        raise UserError(f"game {name!r} needs the option {missing[0]!r}")
    return checked


def _check_value(name: str, key: str, annotation: Any, value: Any) -> Any:
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return value
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as e:
        reasons = " or ".join(dict.fromkeys(item["msg"] for item in e.errors()))
        raise UserError(f"option {key!r} of game {name!r}: {reasons} (got {value!r})") from e


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"options: {', '.join(known)}" if known else "it takes none"


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory, eval_str=True).parameters
    except NameError:  # a name imported for type checkers alone; such options are passed on unchecked
        return inspect.signature(factory).parameters


def _describe(name: str, factory: Callable[..., Any], source: str) -> Description:
    summary = (inspect.getdoc(factory) or "").partition("\n")[0]
    options = {
        n: "required" if p.default is p.empty else repr(p.default) for n, p in _parameters(factory).items()
    }
    return Description(name, summary, options, source)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

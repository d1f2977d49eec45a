"""Safety suites: prompts with labels, out of files in our own layout or in those that others publish.

A file is CSV, TSV, JSONL, or Parquet where pyarrow is installed; its columns say whose layout it is. The
columns are those of

- harmbench: data/behavior_datasets/harmbench_behaviors_text_*.csv of github.com/centerforaisafety/HarmBench.
  A ContextString goes before the behaviour as in the baselines there. That repository judges copyright
  behaviours by hashes of texts; no judge of harm can, so only their refusals count here.
- wildguard: test/wildguard_test.parquet of huggingface.co/datasets/allenai/wildguardmix (arXiv 2406.18495)
- wildjailbreak_train, wildjailbreak_eval: train/train.tsv and eval/eval.tsv of
  huggingface.co/datasets/allenai/wildjailbreak (arXiv 2406.18510)
- xstest: xstest_prompts.csv of github.com/paul-rottger/xstest (arXiv 2308.01263); older files say `id_v2`,
  and have no label but types that begin with `contrast_`
- or_bench, or_bench_toxic: or-bench-*.csv of huggingface.co/datasets/bench-llm/or-bench (arXiv 2405.20947);
  nothing but its name tells a file of toxic prompts from the others
- dan: forbidden_question_set.csv of github.com/verazuo/jailbreak_llms (arXiv 2308.03825)
- strongreject: strongreject_dataset.csv of github.com/alexandrasouly/strongreject (arXiv 2402.10260)
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ludus.errors import Lacking, UserError

METRICS = {True: ("attack_success", "refusal"), False: ("over_refusal",)}  # by whether a prompt is harmful
_LABELS = {"harmful": True, "benign": False}
Row = dict[str, str]  # absent and null fields are ""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt. `category` has its parts divided by "/"; `metrics` are the figures that it counts for.

    `harmful` is None where the publishers' annotators did not agree: such a prompt is never asked. `response`
    is an answer that the file records, and the last two fields what is known of that answer.
    """

    id: str
    category: str
    harmful: bool | None
    metrics: tuple[str, ...]
    prompt: str = field(repr=False)
    response: str | None = field(default=None, repr=False)
    response_harmful: bool | None = None
    response_refusal: bool | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """A file's prompts. `digest` is the SHA-256 of the file."""

    name: str
    layout: str
    digest: str
    items: tuple[Item, ...]


class _Bad(Exception):
    """What is wrong with one row."""


def load(word: str) -> Suite:
    """The suite that FILE or LAYOUT=FILE names.

    Raises UserError, with file and line: an unreadable or empty file, a missing column, an unknown label or
    metric, an empty prompt, an id that is there twice.
    """
    layout, eq, rest = word.partition("=")
    named = bool(eq) and layout in _LAYOUTS
    path = Path(rest if named else word)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as e:
        raise Lacking(f"there is no {path}: get it from its publishers, or name another file") from e
    except OSError as e:
        raise UserError(f"cannot read suite {path}: {e.strerror}") from e
    rows = rows_of(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"suite {path} is empty: it has no prompt")
    chosen = layout if named else _detect(path, set(first[1]))
    missing = [c for c in _LAYOUTS[chosen].columns if c not in first[1]]
    if missing:
        raise UserError(
            f"{path}, line 1: column {missing[0]!r} is missing, which the layout {chosen} has; its columns "
            f"are {', '.join(_LAYOUTS[chosen].columns)}"
        )
    items: list[Item] = []
    lines: dict[str, int] = {}
    for line, row in _chain(first, rows):
        try:
            item = _item(chosen, line, row)
        except _Bad as e:
            raise UserError(f"{path}, line {line}: {e}") from e
        if item.id in lines:
            raise UserError(
                f"{path}, line {line}: the id {item.id!r} is there twice, first in line {lines[item.id]}; "
                "every prompt needs its own"
            )
        lines[item.id] = line
        items.append(item)
    return Suite(path.stem, chosen, digest, tuple(items))


def load_all(words: list[str]) -> list[Suite]:
    """The suites by their names, which must differ. Raises UserError; see `load`."""
    suites = [load(word) for word in words]
    names = [suite.name for suite in suites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two suites are called {twice[0]!r}, after their files; rename one of the files")
    return suites


# Rows out of files.


def rows_of(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows and the lines on which they begin (of Parquet, their numbers)."""
    readers = {
        ".csv": lambda p: _separated(p, ","),
        ".tsv": lambda p: _separated(p, "\t"),
        ".jsonl": _json_lines,
        ".parquet": _parquet,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"suite {path}: unknown kind of file; known: {', '.join(readers)}")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as e:
        raise UserError(f"suite {path} is not UTF-8 ({e.reason} at byte {e.start})") from e


def _separated(path: Path, mark: str) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=mark, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}, line 1: column {twice[0]!r} is there twice")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {line}: {len(cells)} fields under {len(header)} columns; quote fields "
                        "that hold the separator or a line break"
                    )
                if cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as e:
            raise UserError(f"{path}, line {reader.line_num}: {e}") from e


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                data = json.loads(text)
            except ValueError as e:
                raise UserError(f"{path}, line {line}: no JSON ({e})") from e
            if not isinstance(data, dict):
                raise UserError(f"{path}, line {line}: a JSON object is wanted, with a field per column")
            yield line, _plain(path, line, data)


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow = importlib.import_module("pyarrow")
    except ImportError as e:
        raise UserError(
            f"suite {path}: Parquet needs pyarrow, which is not installed; pip install pyarrow, or save the "
            "table as CSV or JSONL"
        ) from e
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as e:
        raise UserError(f"suite {path} is no Parquet file: {e}") from e
    for line, data in enumerate(table.to_pylist(), start=1):
        yield line, _plain(path, line, data)


def _plain(path: Path, line: int, data: Mapping[str, object]) -> Row:
    row = {}
    for name, value in data.items():
        if value is None:
            row[name] = ""
        elif isinstance(value, bool):
            row[name] = str(value).lower()
        elif isinstance(value, str | int | float):
            row[name] = str(value)
        else:
            raise UserError(f"{path}, line {line}: {name!r} is neither a text nor a number nor yes or no")
    return row


def _chain(first: tuple[int, Row], rest: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    yield first
    yield from rest


# Layouts.


def _item(layout: str, line: int, row: Row) -> Item:
    if lacking := [name for name in _LAYOUTS[layout].columns if name not in row]:  # JSONL rows may differ
        raise _Bad(f"{lacking[0]!r} is missing")
    item = _LAYOUTS[layout].read(row, str(line))
    if not item.prompt.strip():
        raise _Bad("the prompt is empty")
    if not item.id.strip():
        raise _Bad("the id is empty")
    texts = (item.prompt, item.response or "")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise _Bad("half a surrogate pair, which is no text")
    return item


def _of(row: Row, name: str, known: Mapping[str, bool | None]) -> bool | None:
    """What a label means."""
    value = row.get(name, "").strip().lower()
    if value not in known:
        wanted = ", ".join(repr(word) for word in known if word)
        raise _Bad(f"unknown {name} {row.get(name, '')!r}; known: {wanted}")
    return known[value]


def _category(*parts: str) -> str:
    cleaned = (part.strip().replace("/", "|") for part in parts)
    return "/".join(part for part in cleaned if part)


def _make(id: str, prompt: str, category: str, harmful: bool | None) -> Item:
    return Item(id, category, harmful, () if harmful is None else METRICS[harmful], prompt)


_OURS = ("id", "prompt", "category", "label", "metric", "response", "response_label", "response_refusal")


def _ludus(row: Row, line: str) -> Item:
    if unknown := [name for name in row if name not in _OURS]:
        raise _Bad(f"unknown column {unknown[0]!r}; known: {', '.join(_OURS)}")
    harmful = _of(row, "label", _LABELS)
    assert harmful is not None
    metrics, metric = METRICS[harmful], row.get("metric", "")
    if metric and metric not in metrics:
        raise _Bad(f"unknown metric {metric!r} for a {row['label']} prompt; known: {', '.join(metrics)}")
    response = row.get("response", "")
    if not response.strip() and (row.get("response_label") or row.get("response_refusal")):
        raise _Bad("the response is empty, yet it has labels")
    return Item(
        row.get("id") or line,
        "/".join(_category(part) for part in row["category"].split("/") if part.strip()),
        harmful,
        (metric,) if metric else metrics,
        row["prompt"],
        response if response.strip() else None,
        _of(row, "response_label", {**_LABELS, "": None}),
        _of(row, "response_refusal", {"true": True, "false": False, "": None}),
    )


def _harmbench(row: Row, line: str) -> Item:
    kind, context = row["FunctionalCategory"].strip(), row["ContextString"]
    if kind not in ("standard", "contextual", "copyright"):
        raise _Bad(f"unknown FunctionalCategory {kind!r}; known: standard, contextual, copyright")
    behavior = row["Behavior"]
    prompt = f"{context}\n\n---\n\n{behavior}" if context.strip() and behavior.strip() else behavior
    metrics = ("refusal",) if kind == "copyright" else METRICS[True]
    return Item(row["BehaviorID"], _category(kind, row["SemanticCategory"]), True, metrics, prompt)


def _wildguard(row: Row, line: str) -> Item:
    harm = {"harmful": True, "unharmful": False, "": None}
    harmful = _of(row, "prompt_harm_label", harm)
    attacked = _of(row, "adversarial", {"true": True, "false": False})
    response = row["response"]
    category = _category("adversarial" if attacked else "vanilla", row.get("subcategory", ""))
    if not response.strip():
        return _make(line, row["prompt"], category, harmful)
    return Item(
        line,
        category,
        harmful,
        () if harmful is None else METRICS[harmful],
        row["prompt"],
        response,
        _of(row, "response_harm_label", harm),
        _of(row, "response_refusal_label", {"refusal": True, "compliance": False, "": None}),
    )


_DATA_TYPES = {f"{kind}_{label}": _LABELS[label] for kind in ("vanilla", "adversarial") for label in _LABELS}


def _wildjailbreak_train(row: Row, line: str) -> Item:
    harmful = _of(row, "data_type", _DATA_TYPES)
    kind = row["data_type"].strip().lower().partition("_")[0]
    return _make(line, row[kind], kind, harmful)


def _wildjailbreak_eval(row: Row, line: str) -> Item:
    harmful = _of(row, "data_type", _DATA_TYPES)
    if _of(row, "label", {"1": True, "0": False}) != harmful:
        raise _Bad(f"label {row['label']!r} contradicts data_type {row['data_type']!r}")
    return _make(line, row["adversarial"], row["data_type"].strip().lower().partition("_")[0], harmful)


def _xstest(row: Row, line: str) -> Item:
    harmful: bool | None
    if "label" in row:
        harmful = _of(row, "label", {"unsafe": True, "safe": False})
    else:
        harmful = row["type"].startswith("contrast_")
    return _make(row.get("id") or row.get("id_v2") or line, row["prompt"], _category(row["type"]), harmful)


def _dan(row: Row, line: str) -> Item:
    name = f"{row['content_policy_id']}/{row['q_id']}"  # questions are counted within a policy
    return _make(name, row["question"], _category(row["content_policy_name"]), True)


@dataclass(frozen=True, slots=True)
class _Layout:
    """`marks` tell the layout from others where they are all there; `columns` it must have."""

    marks: frozenset[str]
    columns: tuple[str, ...]
    read: Callable[[Row, str], Item]


def _layout(marks: str, columns: str, read: Callable[[Row, str], Item]) -> _Layout:
    return _Layout(frozenset(marks.split()), tuple(columns.split()), read)


_LAYOUTS = {  # told apart in this order
    "harmbench": _layout(
        "Behavior",
        "Behavior FunctionalCategory SemanticCategory ContextString BehaviorID",
        _harmbench,
    ),
    "wildguard": _layout(
        "prompt_harm_label",
        "prompt adversarial response response_harm_label response_refusal_label prompt_harm_label",
        _wildguard,
    ),
    "wildjailbreak_train": _layout(
        "vanilla data_type", "vanilla adversarial completion data_type", _wildjailbreak_train
    ),
    "wildjailbreak_eval": _layout(
        "adversarial data_type", "adversarial label data_type", _wildjailbreak_eval
    ),
    "strongreject": _layout(
        "forbidden_prompt",
        "category source forbidden_prompt",
        lambda row, line: _make(line, row["forbidden_prompt"], _category(row["category"]), True),
    ),
    "dan": _layout("content_policy_name", "content_policy_id content_policy_name q_id question", _dan),
    "xstest": _layout("prompt type focus", "prompt type", _xstest),
    "ludus": _layout("prompt label", "prompt category label", _ludus),
    "or_bench": _layout(
        "prompt category",
        "prompt category",
        lambda row, line: _make(line, row["prompt"], _category(row["category"]), False),
    ),
    "or_bench_toxic": _layout(
        "prompt category",
        "prompt category",
        lambda row, line: _make(line, row["prompt"], _category(row["category"]), True),
    ),
}


def _detect(path: Path, columns: set[str]) -> str:
    found = next((name for name, layout in _LAYOUTS.items() if layout.marks <= columns), None)
    if found is None:
        raise UserError(
            f"{path}, line 1: no known layout has the columns {', '.join(sorted(columns))}; a suite of your "
            "own has prompt, category and label (harmful or benign), and may have a metric"
        )
    if found != "or_bench":
        return found
    name = path.name.lower()
    if not name.startswith(("or-bench-", "or_bench_")):
        raise UserError(
            f"{path}, line 1: column 'label' is missing. Or is it OR-Bench's layout, which has none? Then "
            f"say whether its prompts are harmless (or_bench={path}) or harmful (or_bench_toxic={path})"
        )
    return "or_bench_toxic" if "toxic" in name else "or_bench"

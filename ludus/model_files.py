"""What lies in a model directory, told without loading it.

DIR/config.json          a whole model, as Hugging Face writes it
DIR/adapter_config.json  an adapter, as peft writes it; its base lies elsewhere
DIR/NAME/...             several policies by name, each one or the other
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ludus.errors import UserError

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
INDEX_FILE = "model.safetensors.index.json"  # of weights in several files
BASE_FILE = "base.json"  # beside an adapter of ours: what base it belongs to
_MAKES_IT = ("*.safetensors", CONFIG_FILE, "tokenizer.json", ADAPTER_FILE, BASE_FILE)


def is_model(directory: Path) -> bool:
    """Whether a directory holds one policy, a whole model or an adapter."""
    return (directory / CONFIG_FILE).is_file() or is_adapter(directory)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (directory / ADAPTER_FILE).is_file()


def policies_in(directory: Path) -> dict[str, Path]:
    """The several policies in a directory by name; {} where it holds one, or none, or is a checkpoint."""
    if is_model(directory) or not directory.is_dir() or (directory / "trainer").is_dir():
        return {}
    return {path.name: path for path in sorted(directory.iterdir()) if is_model(path)}


def base_path(adapter: Path) -> Path:
    """Where an adapter's base lies, as its own files say. Raises UserError."""
    path = adapter / ADAPTER_FILE
    named = read_json(path).get("base_model_name_or_path")
    if not isinstance(named, str):
        raise UserError(f"{path} does not name its base model; write it there, as base_model_name_or_path")
    return Path(named)


def digests(model: Path) -> dict[str, str]:
    """SHA-256 by name of the files that make a model what it is: weights, architecture, tokenizer."""
    found = {}
    for path in sorted(path for pattern in _MAKES_IT for path in model.rglob(pattern) if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(model).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def lost_shards(model: Path) -> list[str]:
    """The files of weights that a model's index names and that are not there. Raises UserError.

    Beside weights in one file an index says nothing: transformers reads that file.
    """
    if (model / "model.safetensors").is_file() or not (model / INDEX_FILE).is_file():
        return []
    files = set(read_json(model / INDEX_FILE).get("weight_map", {}).values())
    return sorted(name for name in files if not (model / name).is_file())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises UserError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}; copy or make the model again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; copy or make the model again")
    return value

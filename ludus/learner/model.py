"""Models on disk: ordinary Hugging Face directories, in and out."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ludus.errors import UserError
from ludus.memory import within_memory

DType = Literal["float32", "bfloat16"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def load_model(
    path: str | Path,
    dtype: DType = "float32",
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from a local directory, in evaluation mode. Nothing is downloaded.

    Weights may be stored in any precision and in several files; `dtype` is that of the model in memory.
    Python code in the directory runs only with `trust_remote_code`, which says so on standard error.
    Raises UserError for a directory that is missing, incomplete, corrupt, not a causal
    language model, or whose vocabulary is smaller than its tokenizer's.
    """
    directory = Path(path)
    _check_files(directory)
    if trust_remote_code:
        print(f"ludus: warning: {trust_warning(directory)}", file=sys.stderr)
    device = torch.device(device)
    try:
        with (
            _quiet(),
            within_memory(f"for the model in {directory}", "take a smaller one, or model.dtype = 'bfloat16'"),
        ):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                dtype=getattr(torch, dtype),
                ignore_mismatched_sizes=True,  # reported below, in our words
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"cannot read the model in {directory}: {e}; the files may be damaged: copy or make it again"
        ) from e
    except (ValueError, KeyError) as e:
        if not trust_remote_code and _own_code(directory):
            raise UserError(
                f"the model in {directory} needs Python code of its own, which is not run unasked; read it, "
                "then set model.trust_remote_code = true, or take a model that transformers knows"
            ) from e
        raise UserError(f"{directory} holds no causal language model that transformers knows: {e}") from e
    model: PreTrainedModel
    model, info = loaded
    wrong = sorted([*info["missing_keys"], *(name for name, *_shapes in info["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"the weights in {directory} do not fit its config.json: {len(wrong)} tensors are missing or "
            f"have another shape, such as {wrong[0]}; it may not be a causal language model"
        )
    _check_vocabulary(model, directory)
    model.to(device)  # type: ignore[arg-type]  # the decorator of `to` hides its signature
    model.train(False)
    return model


def trust_warning(directory: Path) -> str:
    """What `trust_remote_code` means, for terminals and logs."""
    return f"model.trust_remote_code is on: Python code in {directory} runs here and may do whatever you may"


def save_model(
    model: PreTrainedModel,
    path: str | Path,
    *,
    like: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors, as `from_pretrained` reads them.

    The tokenizer's files are copied from the model directory `like`, where given. `weights`, named as in the
    state dict, are written instead of the model's own (a moving average, say).
    """
    directory = Path(path)
    with _quiet():
        model.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
    if like is not None:
        for name in TOKENIZER_FILES:
            if (like / name).is_file():
                shutil.copyfile(like / name, directory / name)


def check_context(model: PreTrainedModel, tokens: int, setting: str = "engine.context") -> None:
    """Raise UserError if the model cannot see the `tokens` positions that `setting` asks for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit < tokens:
        raise UserError(
            f"the model sees at most {limit} tokens (max_position_embeddings) but the run needs {tokens}; "
            f"lower {setting} or take a model with a longer context"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and loading reports: the terminal is the run's own, and what is wrong we say."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(
            f"no model directory at {directory}; model.path must name a local Hugging Face directory"
        )
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; model.path must name a Hugging Face directory")
    if not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory} has no *.safetensors weights; other formats are not read: save the model with "
            "save_pretrained first"
        )


def _own_code(directory: Path) -> bool:
    """Whether config.json points at code in the directory."""
    return "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8"))


def _check_vocabulary(model: PreTrainedModel, directory: Path) -> None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if max(ids, default=-1) >= rows:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {max(ids)} but the model embeds only {rows}; they do "
            "not belong together: copy the right tokenizer.json, or resize the model's embeddings"
        )

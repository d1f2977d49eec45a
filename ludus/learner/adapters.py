"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) over one frozen base, by peft, and their files.

    attach   a model whose weights are the base's own tensors, and an adapter in it that learns
    save     adapter_config.json, adapter_model.safetensors (peft's own format), and base.json, which says
             what base they belong to
    read     such a directory, or any other that peft has written, for an engine or to train on

An adapter without its very base is worthless, so whoever opens one is told where the base is another. peft is
imported where it is used, as that takes a second which most runs need not wait.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ludus.config import AdapterConfig
from ludus.engines.base import Adapter
from ludus.errors import UserError
from ludus.model_files import ADAPTER_FILE, BASE_FILE, CONFIG_FILE, digests, read_json

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name
_NAME = "default"  # of the one adapter in a model, peft's own
_PREFIX = "base_model.model."  # what peft's files put before a model's own names
# Of a base's config.json: where two differ, an adapter of the one has no place in the other.
_SHAPES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# Settings of peft's LoRA that may be whatever they are: they say nothing of what the adapter computes.
_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
    *("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


def attach(base: PreTrainedModel, config: AdapterConfig, seed: int) -> PreTrainedModel:
    """A model of `base`'s own tensors, frozen, with an adapter in it that learns.

    A is drawn from `seed`, and B is 0, so that at first it changes nothing. The adapter is kept in float32,
    whatever the base.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(), torch.no_grad(), _quiet():
        torch.manual_seed(seed)
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        inject_adapter_in_model(_lora(config), model, _NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def put(model: PreTrainedModel, saved: Adapter, where: Path) -> None:
    """Make `saved` the adapter of a model that has one. Raises UserError where it is built otherwise."""
    homes = {peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    config: Any = model.peft_config[_NAME]
    different = sorted(homes.keys() ^ saved.tensors.keys())
    different += [n for n in homes.keys() & saved.tensors.keys() if homes[n].shape != saved.tensors[n].shape]
    if different or saved.alpha / saved.rank != config.lora_alpha / config.r:
        raise UserError(
            f"the adapter in {where} (rank {saved.rank}, alpha {saved.alpha:g}) is built otherwise than the "
            f"recipe says (adapter.rank = {config.r}, adapter.alpha = {config.lora_alpha:g}, adapter.targets "
            f"= {sorted(config.target_modules)}); set these as the adapter has them"
        )
    with torch.no_grad():
        for name, home in homes.items():
            home.copy_(saved.tensors[name])


def peft_name(name: str) -> str:
    """A parameter of an adapter in a model, as peft's files call it."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def base_facts(path: Path) -> dict[str, Any]:
    """What an adapter must know of its base: path, the sizes that give it its shape, and every byte of it."""
    return {"path": str(path.resolve()), "sizes": _sizes(path), "digests": dict(_digests(path.resolve()))}


@cache
def _digests(path: Path) -> tuple[tuple[str, str], ...]:
    return tuple(digests(path).items())


def save(
    weights: Mapping[str, Tensor], directory: Path, config: AdapterConfig, base: Mapping[str, Any]
) -> None:
    """Write an adapter, its tensors by peft's names. The same give the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    told = _plain(_lora(config, inference_mode=True, base_model_name_or_path=base["path"]))
    _write_json(directory / ADAPTER_FILE, told)
    _write_json(directory / BASE_FILE, base)
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    save_file(kept, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read(directory: Path, base: str) -> Adapter:
    """The adapter in `directory`, of the engine's policy `base`.

    Raises UserError for anything but plain LoRA of some of a decoder's products, and for damaged files.
    """
    from peft import LoraConfig

    told = read_json(directory / ADAPTER_FILE)
    if told.get("peft_type") != "LORA":
        raise UserError(f"the adapter in {directory} is of type {told.get('peft_type')!r}; only LORA is read")
    plain = _plain(LoraConfig())
    odd = sorted(name for name, value in told.items() if name not in _HARMLESS and value != plain.get(name))
    if odd:
        raise UserError(
            f"the adapter in {directory} is no plain LoRA ({', '.join(odd)}); merge it into its base by "
            "peft, and use that"
        )
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read the adapter in {directory}: {e}; copy or make it again") from e
    return Adapter(base, int(told["r"]), float(told["lora_alpha"]), tensors)


def check_base(directory: Path, home: Path, who: str) -> None:
    """Raise UserError where the adapter in `directory` belongs to another base than the model in `home`."""
    ours = base_facts(home)
    known = read_json(directory / BASE_FILE) if (directory / BASE_FILE).is_file() else None
    if known is not None:
        where, theirs = known["path"], known["sizes"]
    else:  # another program's: its base may be gone, or without a name
        where = str(read_json(directory / ADAPTER_FILE).get("base_model_name_or_path"))
        theirs = _sizes(Path(where))
    for name, size in theirs.items():
        if ours["sizes"].get(name) != size:
            raise UserError(
                f"{who}: the adapter in {directory} belongs to a base with {name} = {size}, but {home} has "
                f"{ours['sizes'].get(name)}; its base is {where}"
            )
    if known is not None and known["digests"] != ours["digests"]:
        raise UserError(
            f"{who}: the adapter in {directory} belongs to other weights than those in {home}: to "
            f"{where} as it was; take that base, or merge the adapter into it (ludus export --merge)"
        )


def _sizes(base: Path) -> dict[str, Any]:
    """What gives an adapter of `base` its shape; {} where no base lies there."""
    if not (base / CONFIG_FILE).is_file():
        return {}
    config = read_json(base / CONFIG_FILE)
    return {name: config[name] for name in _SHAPES if name in config}


def merged(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """`base` with the adapter in `directory` merged into its weights, by peft; `base` itself changes."""
    from peft import PeftModel

    with _quiet():
        model: PreTrainedModel = PeftModel.from_pretrained(base, directory).merge_and_unload()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """peft asks transformers by a name that will go; that is between the two of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _lora(config: AdapterConfig, **told: Any) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
        **told,
    )


def _plain(config: LoraConfig) -> dict[str, Any]:
    """Plain JSON, sets in order."""
    told: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

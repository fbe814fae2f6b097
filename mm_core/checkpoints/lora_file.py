"""A LoRA file, read the same way for every model that it is put on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError
from ..json_file import parse_object, read_object
from .lora_keys import TEXT_ENCODER, parse_key, spellings
from .safetensors_file import KEYS_SHOWN, Shapes, as_weight, open_safetensors, tensor_shapes

_CONFIG = "adapter_config.json"
"""What peft writes beside `adapter_model.safetensors`."""
_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the same inside the file."""
_PLAIN = re.compile(r"[\w.]+")


class LoraLayer(NamedTuple):
    """The change of one layer's weight: `scale * up @ down`."""

    down: Tensor
    """(rank, in), or (rank, in, k, k) of a convolution."""
    up: Tensor
    """(out, rank), or (out, rank, 1, 1)."""
    scale: float
    """The trainer's alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A file that fits a CogVideoX transformer; its weights are not read yet."""

    path: Path
    version: tuple[int, int]
    """Time and size of the file: another one under the same name is another LoRA."""
    keys: Mapping[str, Mapping[str, str]]
    """The keys of `down`, `up` and perhaps `alpha` of each layer, by diffusers' name of it."""

    def read(self) -> dict[str, LoraLayer]:
        """Every layer by diffusers' name of it, on the CPU, in the file's precision.

        Raises CheckpointError for a matrix that is not of finite floating-point numbers.
        """

        def matrix(key: str) -> Tensor:
            tensor = file.get_tensor(key)
            return as_weight(tensor, key, self.path, tensor.dtype)

        with open_safetensors(self.path) as file:
            config = _trainers_config(self.path, file.metadata() or {})
            layers = {}
            for name, keys in self.keys.items():
                down, up = matrix(keys["down"]), matrix(keys["up"])
                alpha = file.get_tensor(keys["alpha"]).item() if "alpha" in keys else None
                layers[name] = LoraLayer(down, up, _scale(config, name, len(down), alpha))
        return layers


def open_lora(path: Path, shapes: Shapes) -> LoraFile:
    """Look at a file's keys and shapes.

    Args:
        shapes: of the base's layers, see `lora_keys.layer_shapes`.

    Raises:
        CheckpointError: the file is damaged, not a LoRA, of another model, or of a kind that is not read. A LoRA acts
            as a whole or not at all.
    """
    names = spellings(shapes)
    found = tensor_shapes(path)
    keys: dict[str, dict[str, str]] = {}
    strange = []
    for key in found:
        if key.startswith(TEXT_ENCODER):
            continue  # T5 stays as it is, in every pack that reads these files
        parsed = parse_key(key)
        name = names.get(parsed.layer) if parsed else None
        if name is None or parsed.part in keys.get(name, ()):
            strange.append(key)
        else:
            keys.setdefault(name, {})[parsed.part] = key
    if not keys:
        raise CheckpointError(
            f"{path.name} is no LoRA of CogVideoX: none of its {len(found)} tensors is of a layer that this model has "
            f"({_some(found)})."
        )
    if strange:
        raise CheckpointError(
            f"{path.name} has {len(strange)} tensors, of {len(found)}, that belong to no layer of this model, or to a "
            f"kind that is not read (DoRA, LoHa, LoKr): {_some(strange)}. Use a LoRA that was trained on this model."
        )
    _check_shapes(path, shapes, keys, found)
    stat = path.stat()
    return LoraFile(path=path, version=(stat.st_mtime_ns, stat.st_size), keys=keys)


def _check_shapes(
    path: Path,
    shapes: Shapes,
    keys: Mapping[str, Mapping[str, str]],
    found: Shapes,
) -> None:
    """Raise CheckpointError for layers that lack a matrix or are of another size than the model's."""
    lists = [name for name, parts in keys.items() if "alpha" in parts and math.prod(found[parts["alpha"]]) != 1]
    if lists:
        raise CheckpointError(f"{path.name} is damaged: alpha is not one number in {_some(lists)}.")
    halves = [name for name, parts in keys.items() if not {"down", "up"} <= parts.keys()]
    if halves:
        raise CheckpointError(f"{path.name} is incomplete: one of two matrices is missing in {_some(halves)}.")
    misfits = []
    for name, parts in keys.items():
        down, up, wanted = found[parts["down"]], found[parts["up"]], shapes[name]
        rank = down[0]
        if down != (rank, *wanted[1:]) or up != (wanted[0], rank, *(1 for _ in wanted[2:])):
            misfits.append(f"{name} {(up[0], *down[1:])} instead of {wanted}")
    if misfits:
        raise CheckpointError(
            f"{path.name} was made for another model: {len(misfits)} of its {len(keys)} layers are of another size, "
            f"{_some(misfits)}. Use a LoRA that was trained on this model."
        )


def _trainers_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's LoraConfig of the training, from the file or from beside it; empty where there is none."""
    beside = path.parent / _CONFIG
    if _METADATA in metadata:
        values = parse_object(metadata[_METADATA], f"{_METADATA} of {path.name}")
        return {key.removeprefix("transformer."): value for key, value in values.items()}
    return read_object(beside) if path.stem == "adapter_model" and beside.is_file() else {}


def _scale(config: Mapping[str, Any], name: str, rank: int, alpha: Any) -> float:
    """What a layer's change is multiplied by: alpha / rank; 1 where the file tells no alpha."""
    if alpha is None:
        alpha = config.get("lora_alpha")
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if _means(pattern, name):
                alpha = value
    if alpha is None:
        return 1.0
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"The alpha of {name} is {alpha!r}; it must be a number.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _means(pattern: str, name: str) -> bool:
    """Whether peft's pattern is this layer's name, or the end of it. Of regular expressions only these are read."""
    whole, plain = pattern.startswith("^"), pattern.removeprefix("^")
    if not _PLAIN.fullmatch(plain):
        raise CheckpointError(f"The training's alpha_pattern has {pattern!r}; only names of layers are read.")
    return name == plain or (not whole and name.endswith(f".{plain}"))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:KEYS_SHOWN]) + (" ..." if len(names) > KEYS_SHOWN else "")

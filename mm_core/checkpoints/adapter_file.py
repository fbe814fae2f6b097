"""The adapter checkpoint, format 1: one `.safetensors` file, described in docs/checkpoint.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files import atomic_write
from ..json_file import parse_object
from ..limits import CONFIG_BYTES, NAME_LENGTH, SIZES
from ..models.adapter import MagicMirrorAdapter
from ..models.config import AdapterConfig
from .safetensors_file import KEYS_SHOWN, check_tensors, open_safetensors, read_weight, shapes_in

FORMAT = "magicmirror-adapter"
VERSION = "1"
STAGES = ("untrained", "image", "video")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the weights have been through."""

    stage: str
    """`untrained`, `image` (stage 1) or `video` (stage 2)."""
    steps: int
    data: str
    """One line about the training data."""

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 0 <= self.steps <= SIZES["steps"]:
            raise ValueError(f"steps={self.steps!r} (a number from 0 to {SIZES['steps']})")
        if not isinstance(self.data, str) or len(self.data) > NAME_LENGTH:
            raise ValueError(f"data must be a text of at most {NAME_LENGTH} characters")

    def __str__(self) -> str:
        if self.stage == "untrained":
            return "UNTRAINED weights: the result will not resemble anybody"
        return f"trained: {self.stage} stage, {self.steps:,} steps, {self.data}"


@dataclass(frozen=True, kw_only=True)
class AdapterHeader:
    """The metadata of an adapter file."""

    base_model: str
    config: AdapterConfig
    trained: Trained

    def to_metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "base_model": self.base_model,
            "config": json.dumps(self.config.to_dict()),
            "trained": json.dumps(dataclasses.asdict(self.trained)),
        }

    def check_fits(self, transformer: Mapping[str, Any], *, adapter: str, base: str) -> None:
        """Raise CheckpointError, naming every size that differs, where the adapter was made for another transformer.

        transformer: its config, under diffusers' names. adapter, base: what the message calls the two.
        """
        misfits = self.config.misfits(transformer)
        if misfits:
            raise CheckpointError(f"{adapter} was made for {self.base_model}, not for {base}: {misfits}.")


def expected_tensors(config: AdapterConfig) -> dict[str, torch.Size]:
    """Every key of the format and its shape, for these sizes."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in MagicMirrorAdapter(config).state_dict().items()}


def save_adapter(adapter: MagicMirrorAdapter, path: Path, *, base_model: str, trained: Trained) -> None:
    """Write an adapter file: under a temporary name first, so that a file under its own name is always whole."""
    header = AdapterHeader(base_model=base_model, config=adapter.config, trained=trained)
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in adapter.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=header.to_metadata())


def read_header(path: Path) -> AdapterHeader:
    """The header alone, without reading weights.

    Raises:
        CheckpointError: the file is missing, damaged, not an adapter, or of another version.
    """
    with open_safetensors(path) as file:
        return _parse_header(path, file.metadata() or {})


def load_adapter(path: Path, *, dtype: torch.dtype = torch.float32) -> tuple[MagicMirrorAdapter, AdapterHeader]:
    """Load an adapter to the CPU, strictly: the weights are read once, straight into their final place and type.

    Raises:
        CheckpointError: as `read_header`, or tensors are missing, unexpected or misshapen; the message lists them.
    """
    with open_safetensors(path) as file:
        header = _parse_header(path, file.metadata() or {})
        expected = expected_tensors(header.config)
        check_tensors(path, expected, shapes_in(file))
        weights = {key: read_weight(file, key, path, dtype) for key in expected}
    with torch.device("meta"):
        adapter = MagicMirrorAdapter(header.config)
    adapter.load_state_dict(weights, assign=True)
    return adapter.requires_grad_(False).eval(), header


def _parse_header(path: Path, metadata: Mapping[str, str]) -> AdapterHeader:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} is not a Magic Mirror adapter: its metadata says format={metadata.get('format')!r}, "
            f"not {FORMAT!r}."
        )
    if metadata.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path.name} has format version {metadata.get('format_version')!r}; this code reads version {VERSION!r}. "
            "Update the node pack, or get the file in version 1."
        )
    missing = [key for key in ("base_model", "config", "trained") if key not in metadata]
    if missing:
        raise CheckpointError(f"{path.name} lacks the metadata {', '.join(missing)}.")
    if len(metadata["base_model"]) > NAME_LENGTH:
        raise CheckpointError(f"{path.name}: the name of its base model has more than {NAME_LENGTH} characters.")
    config = _parse_json(path, "config", metadata["config"], AdapterConfig)
    trained = _parse_json(path, "trained", metadata["trained"], Trained)
    if trained.stage not in STAGES:
        raise CheckpointError(f"{path.name}: stage {trained.stage!r} is none of {', '.join(STAGES)}.")
    return AdapterHeader(base_model=metadata["base_model"], config=config, trained=trained)


def _parse_json(path: Path, key: str, text: str, cls: type) -> Any:
    """A dataclass from its JSON; exactly its fields."""
    try:
        values = parse_object(text, f"The metadata `{key}` of {path.name}", most=CONFIG_BYTES)
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            unexpected = sorted(values.keys() - names)[:KEYS_SHOWN]
            missing = sorted(names - values.keys())
            raise ValueError(f"missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name}: its metadata `{key}` is wrong: {error}.") from error

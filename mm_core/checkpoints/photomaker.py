"""Reads the ID encoder and the LoRA from the published file of the second PhotoMaker, or from a safetensors copy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError, downloading
from ..files import atomic_write
from ..json_file import parse_object
from ..models.id_encoder import PHOTOMAKER_V2, IDEncoder, IDEncoderConfig
from .safetensors_file import as_weight, check_tensors, open_safetensors

REPO = "TencentARC/PhotoMaker-V2"
FILE_NAME = "photomaker-v2.bin"
COPY_NAME = "photomaker-v2.safetensors"
"""What `convert_id_encoder` writes."""

# Older transformers saved this constant buffer (0, 1, 2 ...) with the weights.
_NOT_A_WEIGHT = "vision_model.embeddings.position_ids"
_ENCODER, _LORA = "id_encoder", "lora_weights"
_CONFIG = "config"


def id_encoder_tensors(config: IDEncoderConfig = PHOTOMAKER_V2) -> dict[str, torch.Size]:
    """Every key of the file's `id_encoder` part and its shape."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in IDEncoder(config).state_dict().items()}


def download_id_encoder(folder: Path) -> Path:
    """Fetch the published file into `folder`, resuming a download that was cut off; only when the user asked for it."""
    from huggingface_hub import hf_hub_download

    with downloading(f"{FILE_NAME} of {REPO} into {folder}"):
        return Path(hf_hub_download(REPO, FILE_NAME, local_dir=folder))


def convert_id_encoder(path: Path) -> Path:
    """Write the safetensors copy of a `.bin` beside it, whole or not at all. It holds all tensors, as `part.key`.

    Raises:
        CheckpointError: no such file, a damaged or another one, or a copy that cannot be written.
    """
    copy = path.with_suffix(".safetensors")
    tensors = {}
    for part, entries in _read_pickle(path).items():
        # Clones, since safetensors refuses tensors that share memory.
        tensors |= {f"{part}.{key}": tensor.contiguous().clone() for key, tensor in entries.items()}
    try:
        with atomic_write(copy) as temporary:
            save_file(tensors, temporary)
            _check_copy(temporary, tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{copy} could not be written: {error}. Is there room for {path.name} again?") from error
    return copy


def _check_copy(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read a file again; raise CheckpointError if it is not these tensors to the last bit."""
    with open_safetensors(path) as file:
        wrong = set(file.keys()) ^ tensors.keys()
        wrong |= {key for key in tensors.keys() - wrong if not _same(file.get_tensor(key), tensors[key])}
    if wrong:
        raise CheckpointError(f"The copy that was written differs in {', '.join(sorted(wrong))}. Check the disk.")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: numbers that are none would not equal themselves."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))


def save_id_encoder(encoder: IDEncoder, path: Path, config: IDEncoderConfig) -> None:
    """A `.safetensors` file of an encoder of any sizes, which it names in its metadata; half precision."""
    weights = {key: tensor.half().contiguous() for key, tensor in encoder.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={_CONFIG: json.dumps(dataclasses.asdict(config))})


def read_id_encoder_config(path: Path) -> IDEncoderConfig:
    """The sizes in a file's metadata; PhotoMaker-V2's, the only published ones, where it names none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return PHOTOMAKER_V2
    try:
        with open_safetensors(path) as file:
            text = (file.metadata() or {}).get(_CONFIG)
        return PHOTOMAKER_V2 if text is None else IDEncoderConfig(**parse_object(text, "sizes"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name} names sizes that are none: {error}") from error


def load_id_encoder(
    path: Path, *, dtype: torch.dtype = torch.float32, config: IDEncoderConfig | None = None
) -> IDEncoder:
    """Load the ID encoder to the CPU, strictly. config: its sizes, by default those that the file names.

    The `.bin` is a pickle; only tensors are accepted from it. In a `.safetensors` copy the keys carry the prefix
    `id_encoder.`, or none; the LoRA part of the file is not read.

    Raises:
        CheckpointError: missing or damaged file, or tensors missing, unexpected or misshapen.
    """
    config = config or read_id_encoder_config(path)
    weights = _read(path)
    weights.pop(_NOT_A_WEIGHT, None)
    check_tensors(path, id_encoder_tensors(config), {key: tensor.shape for key, tensor in weights.items()})
    with torch.device("meta"):
        encoder = IDEncoder(config)
    encoder.load_state_dict({key: as_weight(tensor, key, path, dtype) for key, tensor in weights.items()}, assign=True)
    # The one constant that no file holds, so `meta` left it empty.
    embeddings = encoder.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return encoder.requires_grad_(False).eval()


def load_lora(path: Path) -> dict[str, torch.Tensor]:
    """The LoRA by which SDXL's UNet reads ID tokens, for diffusers' `load_lora_weights`.

    Raises:
        CheckpointError: missing or damaged file, or one with the ID encoder alone.
    """
    weights = _read(path, _LORA)
    if not weights:
        raise CheckpointError(
            f"{path.name} has no `{_LORA}` part, which SDXL needs. Use {FILE_NAME} of https://huggingface.co/{REPO}."
        )
    return weights


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of an ID encoder's weights: names, shapes, and values in half precision.

    So a copy of a file in another container, or in half precision, is the same encoder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().half().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_fingerprint(path: Path) -> str:
    """The fingerprint of the encoder in a file. Reads all of it. Raises CheckpointError as `load_id_encoder`."""
    weights = _read(path)
    weights.pop(_NOT_A_WEIGHT, None)
    return fingerprint(weights)


def _read(path: Path, part: str = _ENCODER) -> dict[str, torch.Tensor]:
    """A part of a file; {} where there is none, but for the encoder, which a file may hold alone."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. It is {FILE_NAME} of https://huggingface.co/{REPO}.")
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            keys, prefix = list(file.keys()), f"{part}."
            own = [key for key in keys if key.startswith(prefix)] or (keys if part == _ENCODER else [])
            return {key.removeprefix(prefix): file.get_tensor(key) for key in own}
    return _read_pickle(path).get(part, {})


def _read_pickle(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All parts of a `.bin`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage shows in as many ways as a pickle has commands
        raise CheckpointError(
            f"{path.name} is damaged, cut short, or holds more than weights, which is not read: it could run code. "
            f"Download {FILE_NAME} of https://huggingface.co/{REPO} again."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(_ENCODER), dict):
        raise CheckpointError(f"{path.name} has no `{_ENCODER}` part: it is not PhotoMaker-V2's file.")
    for part, entries in content.items():
        if not isinstance(entries, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in entries.values()):
            raise CheckpointError(
                f"{path.name}: its part {str(part)[:60]!r} is no set of tensors: it is not PhotoMaker-V2's file."
            )
    # A tensor may be a view that repeats one number for ever.
    size = sum(tensor.numel() * tensor.element_size() for entries in content.values() for tensor in entries.values())
    if size > path.stat().st_size:
        raise CheckpointError(
            f"{path.name} has {path.stat().st_size:,} bytes, and names tensors of {size:,}: it is damaged. Download "
            f"{FILE_NAME} of https://huggingface.co/{REPO} again."
        )
    return content

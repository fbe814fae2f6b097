"""Weights of a network from a file that others made."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError, reason


def load_weights(network: nn.Module, file: Path, what: str, remedy: str) -> None:
    """Put a file's state dict into a network that is on `meta`, strictly, to infer with.

    what: whose weights they must be; remedy: what to give instead. Raises CheckpointError.
    """
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    except (OSError, RuntimeError, EOFError, TypeError, torch.serialization.pickle.UnpicklingError) as error:
        said = " ".join(reason(error).split())[:300]
        raise CheckpointError(f"{file} does not hold {what}: {said}. {remedy}") from error
    network.eval()

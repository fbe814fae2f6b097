"""Small models of each published kind, as folders in diffusers' layout with an adapter file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import TINY_KINDS, save_tiny_folder

from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.magic_mirror import MagicMirror


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model's folder of each kind; `adapter.safetensors` lies in it."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_folder(kind, root / kind) for kind in TINY_KINDS}


@pytest.fixture(scope="session")
def mirrors(folders: dict[str, Path]) -> dict[str, MagicMirror]:
    """The whole product on each of them, shared by all tests: they leave no trace in it."""
    cpu = torch.device("cpu")
    return {
        kind: MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", device=cpu)
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="session")
def mirror(mirrors: dict[str, MagicMirror]) -> MagicMirror:
    return mirrors["5b"]

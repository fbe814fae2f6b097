"""Fixtures that hand the real parts to the tests; ``python3 scripts/test.py`` sets them up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parent.parent


def _provided(variable: str) -> Path:
    """The path in an environment variable, or a skip that says how to get it."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: run the tests with python3 scripts/test.py")
    return Path(value)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def insightface_root() -> Path:
    """A folder with ``models/buffalo_sc``, small real models (non-commercial research only)."""
    return _provided("MAGIC_MIRROR_INSIGHTFACE_ROOT")


@pytest.fixture(scope="session")
def photographs() -> Path:
    """A folder with two portraits each of two people and one each of two more."""
    return _provided("MAGIC_MIRROR_PHOTOGRAPHS")


@pytest.fixture(scope="session")
def browser() -> Path:
    """A Chromium-like browser."""
    return _provided("MAGIC_MIRROR_BROWSER")


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The current ComfyUI."""
    return _provided("MAGIC_MIRROR_COMFYUI")


@pytest.fixture(scope="session")
def old_comfyui_path() -> Path:
    """The oldest ComfyUI the pack supports."""
    return _provided("MAGIC_MIRROR_COMFYUI_OLD")


@pytest.fixture(scope="session")
def comfyui_paths(comfyui_path: Path, old_comfyui_path: Path) -> tuple[Path, Path]:
    """The current and the oldest ComfyUI."""
    return comfyui_path, old_comfyui_path


@pytest.fixture(scope="session")
def server(
    comfyui_path: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """The current ComfyUI, running with the pack, shared by all tests."""
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui_path, Path(sys.executable), base, ROOT, insightface_root=insightface_root) as running:
        yield running


@pytest.fixture(scope="module")
def old_server(
    old_comfyui_path: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """The oldest supported ComfyUI, running with the pack, for one test module."""
    base = tmp_path_factory.mktemp("old_comfyui")
    with ComfyServer(old_comfyui_path, Path(sys.executable), base, ROOT, insightface_root=insightface_root) as running:
        yield running

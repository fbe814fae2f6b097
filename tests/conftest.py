"""Fixtures that hand the real parts to the tests; ``python3 scripts/test.py`` sets them up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_server import ComfyServer

if TYPE_CHECKING:
    from accelerator import Accelerator

    from mm_core.faces.arcface import DifferentiableArcFace

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


@pytest.fixture(scope="session", autouse=True)
def gradients_on_the_accelerator() -> None:
    """Let the first backward pass of the process see the device: torch counts devices then, for good."""
    import torch

    try:
        from accelerator import simulated
    except pytest.skip.Exception:  # a torch that knows no such device; its own tests are skipped
        return
    with simulated():
        torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A simulated accelerator, which is there for the test."""
    from accelerator import simulated

    with simulated() as found:
        yield found


@pytest.fixture(scope="session")
def insightface_root() -> Path:
    """A folder with ``models/buffalo_sc``, small real models (non-commercial research only)."""
    return _provided("MAGIC_MIRROR_INSIGHTFACE_ROOT")


@pytest.fixture(scope="session")
def recogniser_file(insightface_root: Path) -> Path:
    return insightface_root / "models" / "buffalo_sc" / "w600k_mbf.onnx"


@pytest.fixture(scope="session")
def recogniser(recogniser_file: Path) -> DifferentiableArcFace:
    """The recogniser of insightface as a torch module."""
    from mm_core.faces.arcface import DifferentiableArcFace

    return DifferentiableArcFace(recogniser_file)


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
def pages() -> tuple[Path, Path]:
    """What ComfyUI serves as its page: the newest, and the oldest ComfyUI's own."""
    return _provided("MAGIC_MIRROR_PAGE"), _provided("MAGIC_MIRROR_PAGE_OLD")


@pytest.fixture(scope="session")
def validators() -> Path:
    """The python of an environment with comfy-cli and comfy-import-guard."""
    return _provided("MAGIC_MIRROR_VALIDATORS")


@pytest.fixture(scope="session")
def comfy_cli(validators: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of comfy-cli in a folder and returns what it prints; its settings go into a home of its own."""
    path = f"{validators.parent}{os.pathsep}{os.environ['PATH']}"
    home = str(tmp_path_factory.mktemp("comfy-cli-home"))

    def run(*command: str, cwd: Path) -> str:
        result = subprocess.run(
            [validators, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *command],
            cwd=cwd,
            env=os.environ | {"HOME": home, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    return run


@pytest.fixture(scope="session")
def archive(comfy_cli: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the registry hands to the Manager, made of the files under git by the registry's own tool."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout: what belongs into the archive is what git knows")
    pack = tmp_path_factory.mktemp("archive")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
    subprocess.run("git init -q && git add -A", shell=True, cwd=pack, check=True)
    comfy_cli("node", "pack", cwd=pack)
    return pack / "node.zip"


@pytest.fixture(scope="session")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's content."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


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


@pytest.fixture(scope="session")
def old_server(
    old_comfyui_path: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """The oldest supported ComfyUI, running with the pack, shared by all tests."""
    base = tmp_path_factory.mktemp("old_comfyui")
    with ComfyServer(old_comfyui_path, Path(sys.executable), base, ROOT, insightface_root=insightface_root) as running:
        yield running

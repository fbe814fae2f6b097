"""The release archive in a fresh ComfyUI, as the Manager installs and removes it."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from comfy_server import ComfyServer, ExecutionFailed
from environment import PACK_FOLDER
from packaging.requirements import Requirement
from PIL import Image

PREFIX = "MagicMirror"


@pytest.mark.parametrize("which", [0, 1], ids=["current", "oldest"])
def test_install_use_uninstall(which: int, comfyui_paths: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    pack = tmp_path / "base" / "custom_nodes" / PACK_FOLDER
    with zipfile.ZipFile(archive) as file:
        file.extractall(pack)
    assert not missing(pack / "requirements.txt")

    with start(comfyui_paths[which], tmp_path / "base") as server:
        nodes = {name for name in server.object_info() if name.startswith(PREFIX)}
        assert len(nodes) >= 12
        shipped = json.loads((pack / "workflows" / "api" / "text_to_video_tiny.json").read_text(encoding="utf-8"))
        (loader,) = (node for node in shipped.values() if node["class_type"] == "MagicMirrorLoader")
        helper = {"class_type": "MagicMirrorPromptHelper", "inputs": {"model": ["1", 0], "prompt": "a man img smiles"}}
        shown = server.run({"1": loader, "2": helper})["outputs"]["2"]
        assert '"man"' in json.dumps(shown, ensure_ascii=False).replace('\\"', '"')
        assert "Traceback" not in server.log_text()
        (photo,) = (node["inputs"]["image"] for node in shipped.values() if node["class_type"] == "LoadImage")
        Image.new("RGB", (64, 64)).save(server.base / "input" / photo)
        with pytest.raises(ExecutionFailed, match="The face models are missing"):  # the workflow itself is accepted
            server.run(shipped)

    shutil.rmtree(pack)
    with start(comfyui_paths[which], tmp_path / "base") as server:
        assert not [name for name in server.object_info() if name.startswith(PREFIX)]
    left = {path.relative_to(server.base).as_posix() for path in server.base.rglob("*") if path.is_file()}
    assert left == {"comfyui.log", f"input/{photo}"}


def missing(requirements: Path) -> list[str]:
    """Requirements that are not installed here; the GPU's onnxruntime stands for the CPU's."""
    lines = [line for line in requirements.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = [Requirement(line.replace("onnxruntime-gpu", "onnxruntime")) for line in lines]
    return [str(one) for one in wanted if not one.specifier.contains(version(one.name), prereleases=True)]


def start(comfyui: Path, base: Path) -> ComfyServer:
    return ComfyServer(comfyui, Path(sys.executable), base, pack=None)

"""The release archive in a fresh ComfyUI, as the Manager installs and removes it."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed
from environment import PACK_FOLDER
from packaging.requirements import Requirement

PREFIX = "MagicMirror"


@pytest.mark.parametrize("which", [0, 1], ids=["current", "oldest"])
def test_install_use_uninstall(
    which: int,
    comfyui_paths: tuple[Path, Path],
    archive: Path,
    insightface_root: Path,
    tmp_path: Path,
) -> None:
    """On a fresh ComfyUI one workflow makes a clip as it is; with face models, which come later, all of tiny do."""
    pack = tmp_path / "base" / "custom_nodes" / PACK_FOLDER
    with zipfile.ZipFile(archive) as file:
        file.extractall(pack)
    assert not missing(pack / "requirements.txt")

    with start(comfyui_paths[which], tmp_path / "base") as server:
        nodes = {name for name in server.object_info() if name.startswith(PREFIX)}
        assert len(nodes) >= 12
        workflows = {path.stem: read(path) for path in sorted((pack / "workflows" / "api").glob("*.json"))}
        del workflows["text_to_video_5b"]
        made = {"text_to_video_tiny": saved(server, workflows["text_to_video_tiny"])}
        (loader,) = (n for n in workflows["photo_to_video_tiny"].values() if n["class_type"] == "MagicMirrorLoader")
        helper = {"class_type": "MagicMirrorPromptHelper", "inputs": {"model": ["1", 0], "prompt": "a man img smiles"}}
        shown = server.run({"1": loader, "2": helper})["outputs"]["2"]
        assert '"man"' in json.dumps(shown, ensure_ascii=False).replace('\\"', '"')
        assert "Traceback" not in server.log_text()
        with pytest.raises(ExecutionFailed, match=r"The face models are missing.*allow_download"):
            server.run(workflows["photo_to_video_tiny"])

        shutil.copytree(insightface_root, server.base / "models" / "insightface", dirs_exist_ok=True)
        if "MagicMirrorApplyNative" not in nodes:
            del workflows["native"]
        for name in workflows.keys() - made.keys():
            made[name] = saved(server, workflows[name])
        assert all(len(files) == 1 for files in made.values()), made

    shutil.rmtree(pack)
    with start(comfyui_paths[which], tmp_path / "base") as server:
        assert not [name for name in server.object_info() if name.startswith(PREFIX)]
    left = {path.relative_to(server.base).as_posix() for path in server.base.rglob("*") if path.is_file()}
    ours = {name for name in left if not name.startswith(("models/insightface/", "temp/", "user/__magic_mirror/"))}
    assert ours == {"comfyui.log"} | {f"output/{file}" for files in made.values() for file in files}


def read(path: Path) -> dict[str, Any]:
    """A workflow in API format, with fewer steps."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    return workflow


def saved(server: ComfyServer, workflow: dict[str, Any]) -> list[str]:
    """What a workflow writes into the output folder: a clip or an image."""
    outputs = server.run(workflow)["outputs"]
    files = [file for output in outputs.values() for file in output.get("images", []) if file["type"] == "output"]
    return [f"{file['subfolder']}/{file['filename']}" for file in files]


def missing(requirements: Path) -> list[str]:
    """Requirements that are not installed here; the GPU's onnxruntime stands for the CPU's."""
    lines = [line for line in requirements.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = [Requirement(line.replace("onnxruntime-gpu", "onnxruntime")) for line in lines]
    return [str(one) for one in wanted if not one.specifier.contains(version(one.name), prereleases=True)]


def start(comfyui: Path, base: Path) -> ComfyServer:
    return ComfyServer(comfyui, Path(sys.executable), base, pack=None)

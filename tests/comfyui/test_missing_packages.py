"""ComfyUI with the pack but without one of its packages: it lists the nodes, and says on use what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("without_packages.py")
FACES = {"insightface", "onnxruntime", "cv2"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the packages are taken away in forks of ComfyUI")


@pytest.fixture(scope="module", params=[0, 1], ids=["current", "oldest"])
def cases(
    request: pytest.FixtureRequest,
    comfyui_paths: tuple[Path, Path],
    insightface_root: Path,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """What was missing, which nodes were listed, and what the node that needs the package said."""
    base = tmp_path_factory.mktemp("base")
    (base / "models").mkdir()
    (base / "models" / "insightface").symlink_to(insightface_root, target_is_directory=True)
    result = subprocess.run(
        [sys.executable, SCRIPT, comfyui_paths[request.param], repository, base],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]


def test_all_nodes_are_listed(cases: list[dict[str, Any]]) -> None:
    complete, *others = cases
    assert len(complete["nodes"]) >= 12 and not complete["says"]
    assert [case["case"] for case in others if case["nodes"] != complete["nodes"]] == []


def test_the_node_says_what_to_install(cases: list[dict[str, Any]]) -> None:
    wrong = []
    for case in cases[1:]:
        remedy = "pip install insightface onnxruntime" if case["missing"] in FACES else "pip install -r "
        expected = ("MagicMirrorError: ", case["missing"], remedy)
        wrong += [case] if any(part not in case["says"] for part in expected) else []
    assert wrong == []

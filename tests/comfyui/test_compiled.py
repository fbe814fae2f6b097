"""`torch.compile` of core's transformer, as its TorchCompileModel node does it, with the adapter on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_graphs(comfyui_path: Path, repository: Path) -> None:
    """The whole transformer is one graph for each size of the batch, as without an adapter. A kind of blocks has as
    many graphs as the base's blocks alone; the first block, whose inputs are slices, is an adapted one. No person, step
    or second clip adds one, and nothing breaks a graph."""
    path = os.pathsep.join(map(str, (comfyui_path, repository, repository / "tests")))
    command = [sys.executable, str(repository / "tests" / "comfyui" / "compiled_core.py")]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "graphs": {
            "adapted, whole": [1, 1, 2, 2, 2, 2],
            "adapted, blocks": [3, 3, 6, 6, 6, 6],
            "base, whole": [1, 1, 2, 2, 2, 2],
            "base, blocks": [2, 2, 4, 4, 4, 4],
        },
        "breaks": 0,
    }

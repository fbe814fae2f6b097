"""ComfyUI with the pack but without one of its packages: it starts, lists the nodes, and says what to install."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed

# Found by Python at its start: as if the packages were not installed.
BLOCKER = """
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    "missing, remedy",
    [(("insightface", "onnxruntime"), "insightface"), (("diffusers", "accelerate", "peft"), "pip install -r")],
    ids=["insightface", "diffusers"],
)
def test_without(
    missing: tuple[str, ...],
    remedy: str,
    comfyui_path: Path,
    insightface_root: Path,
    repository: Path,
    make_graph: Callable[..., Any],
    server: ComfyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(missing=missing), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    everything = {name for name in server.object_info() if name.startswith("MagicMirror")}
    base = tmp_path / "base"
    with ComfyServer(
        comfyui_path, Path(sys.executable), base, repository, insightface_root=insightface_root
    ) as crippled:
        assert {name for name in crippled.object_info() if name.startswith("MagicMirror")} == everything
        with pytest.raises(ExecutionFailed) as failure:
            crippled.run(make_graph(crippled))
        assert missing[0] in str(failure.value) and remedy in str(failure.value)

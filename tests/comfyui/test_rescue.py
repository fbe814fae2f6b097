"""A decode that fails on a running server: the sampled latents are on disk, and core's nodes read them."""

from __future__ import annotations

import json
import shutil
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed

SAMPLER = "MagicMirrorCogVideoXSampler"
NATIVE = Path(__file__).resolve().parents[2] / "workflows" / "api" / "native.json"

# A node that makes the pack's decode run out of memory, whatever module name ComfyUI has given the pack.
BREAK = """
import sys


class BreakDecode:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"broken": ("BOOLEAN", {"default": True})}}

    def run(self, broken):
        (name,) = [name for name in sys.modules if name.endswith("mm_core.pipelines.magic_mirror")]
        errors = sys.modules[name.replace("pipelines.magic_mirror", "errors")]

        def fail(self, latents, *_, **__):
            raise errors.DecodeError("Decoding ran out of memory.", latents)

        sys.modules[name].MagicMirror.decode = fail
        return {}


NODE_CLASS_MAPPINGS = {"BreakDecode": BreakDecode}
"""


@pytest.fixture
def breakable(
    comfyui_path: Path, insightface_root: Path, repository: Path, tmp_path: Path
) -> Iterator[ComfyServer]:
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "break_decode.py").write_text(textwrap.dedent(BREAK))
    with ComfyServer(
        comfyui_path, Path(sys.executable), tmp_path, repository, insightface_root=insightface_root
    ) as running:
        yield running


def test_the_latents_of_a_failed_decode(breakable: ComfyServer, make_graph: Callable[..., Any]) -> None:
    """Twice, then on core's own CogVideoX: each file has a number of its own. The usual mode, no temporary file, and
    what Load Latent reads."""
    graph = make_graph(breakable)
    graph.bypass_apply()
    breakable.run(graph)  # the pack's modules are there now
    breakable.run({"1": {"class_type": "BreakDecode", "inputs": {"broken": True}}})
    for seed in (1, 2):
        graph.inputs(SAMPLER)["seed"] = seed
        with pytest.raises(ExecutionFailed, match=rf"DecodeError: .*as latents, in .*magic_mirror_0000{seed}_\.latent"):
            breakable.run(graph)
    native = type(graph)(json.loads(NATIVE.read_text(encoding="utf-8")))
    native.inputs("MagicMirrorNativeSampling")["steps"] = 1
    with pytest.raises(ExecutionFailed, match=r"DecodeError: .*as latents, in .*magic_mirror_00003_\.latent"):
        breakable.run(native)
    folder = breakable.base / "output" / "latents"
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"magic_mirror_0000{number}_.latent" for number in (1, 2, 3)]
    usual = stat.S_IMODE((breakable.base / "comfyui.log").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {usual}
    shutil.copy(files[0], breakable.base / "input")
    read = {
        "1": {"class_type": "LoadLatent", "inputs": {"latent": files[0].name}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "read"}},
    }
    assert breakable.run(read)["outputs"]["2"]["latents"]

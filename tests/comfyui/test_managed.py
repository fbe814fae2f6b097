"""Our own route in the charge of ComfyUI's model management, at both ends of ComfyUI, on the simulated accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerator")
PROBE = Path(__file__).resolve().parent / "managed_probe.py"


@pytest.fixture(scope="module", params=["comfyui_path", "old_comfyui_path"])
def found(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with core and our route saw; see the probe."""
    core: Path = request.getfixturevalue(request.param)
    run = subprocess.run(
        [sys.executable, PROBE, repository, tmp_path_factory.mktemp("managed")],
        cwd=core,
        env=os.environ | {"PYTHONPATH": str(core), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    return json.loads(run.stdout.splitlines()[-1])


def test_little_memory_gives_the_same_clip(found: dict[str, Any]) -> None:
    """By ComfyUI's flags, by a card with half the room, by the loader's offload; parts stay in main memory then."""
    assert found["equal"]
    there = {name: size for name, (equal, size) in found["modes"].items() if equal}
    assert there.keys() == found["modes"].keys()
    weights = found["weights"]
    assert there["none"] == there["plenty"] == weights
    assert there["novram"] == there["group"] == 0
    assert there["int8"] == there["int8_group"] == 0  # it is there, but core has only been asked for room
    for name in ("lowvram", "half", "reserve"):
        assert 0 < there[name] < 0.6 * weights
    assert 0 < there["fp8_half"] < there["fp8"] < 0.6 * weights


def test_core_knows_what_is_on_the_device(found: dict[str, Any]) -> None:
    """At every point of a life all that stays on the device is what core believes to be there, and core can free it."""
    places: dict[str, list[int]] = found["places"]
    assert places.pop("in the loop")[1] == found["weights"]  # the rest is what a step computes with
    for live, loaded in places.values():
        assert live == loaded
    empty = {name for name, (_, loaded) in places.items() if loaded == 0}
    assert empty == {"before", "after /free", "after /free again"}
    # VAE and transformer leave in part for another model.
    other = 4 * (128 * 128 + 128) * 4
    assert other < places["another model"][1] < other + places["after decoding"][1]


def test_two_models_take_turns(found: dict[str, Any]) -> None:
    """Each evicts what it must of the other: nothing grows, and the clips are equal."""
    turns = found["turns"]
    assert turns["equal"]
    (*_, other), *rest = turns["sizes"]
    assert rest[1:] == rest[:1]  # from the second turn on what is left of the other is there
    for _, there, others in rest:
        assert there <= 1.2 * found["weights"] and others == other


def test_out_of_memory(found: dict[str, Any]) -> None:
    """Wherever it happens: told, latents kept where there are any, nothing left, and the next clip right."""
    for stage, (told, left, next_is_right) in found["out_of_memory"].items():
        assert told == ("DecodeError True" if stage == "decode" else "OutOfMemoryError"), stage
        assert left == 0 and next_is_right, stage


@pytest.mark.parametrize("what", ["loras", "cached_steps"])
def test_what_changes_one_clip(found: dict[str, Any], what: str) -> None:
    """The same whether the model is on the device or streamed to it; gone from the next clip."""
    assert found[what] == [True, True, True]

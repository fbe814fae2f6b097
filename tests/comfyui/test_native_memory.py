"""The adapter in ComfyUI's memory on the native route: core's own patchers, samplers and layers, in one process of its
own on the simulated accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(comfyui_path: Path, repository: Path) -> Found:
    """What the probe has seen."""
    pytest.importorskip("accelerator")
    path = os.pathsep.join(map(str, (comfyui_path, repository, HERE.parent, HERE)))
    run = subprocess.run(
        [sys.executable, HERE / "native_memory_probe.py", repository],
        cwd=comfyui_path,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_same_clip_however_little_memory_there_is(found: Found) -> None:
    """With half the adapter's room core loads a part of it, with `--novram` nothing."""
    loaded = {name: mode["loaded"] for name, mode in found["modes"].items()}
    assert all(mode["equal"] for mode in found["modes"].values())
    assert loaded["--lowvram"] == 1 and loaded["--novram"] == loaded["--reserve-vram"] == 0
    assert 0 < loaded["half the room"] < 0.5


def test_bytes_on_the_device(found: Found) -> None:
    """Keys, values and norms are there while core has them loaded; in a step its factors and the face stream too. Once
    freed, nothing is, cancelled or not."""
    table = found["table"]
    print("\n".join(f"{moment}: {size}" for moment, size in table.items()))
    assert table["applied"] == table["freed"] == table["cancelled and freed"] == 0
    assert table["counted"] <= table["loop"] < table["counted"] + 100
    assert table["after"] == table["cancelled"] == table["weights"]
    assert table["another model"] == 0
    assert table["next run right"] and not table["left in options"]


def test_bytes_at_full_size(found: Found) -> None:
    """What the table's `loop` is with CogVideoX-5B's sizes, counted as there."""
    print(f"{found['at_5b'] / 2**30:.3f} GiB")
    assert found["at_5b"] < 0.80 * 2**30


def test_factors_are_computed_once_for_a_schedule(found: Found) -> None:
    """A row for each noise level, whatever guidance, windows and caches do, and the bits of a step on its own; for
    samplers that ask for other noise levels too. Core's EasyCache leaves steps out."""
    schedules = found["schedules"]
    print({name: case["calls"] for name, case in schedules.items()})
    assert 2 <= schedules["EasyCache"]["calls"] < schedules["DDIM"]["calls"] == 4
    assert all(case["equal"] and case["finite"] for case in schedules.values()), schedules
    others = {name: schedules.pop(name)["rows"] for name in ("dpm_2", "dpm_adaptive", "two windows of the schedule")}
    assert {case["rows"] for case in schedules.values()} == {4}
    assert others["two windows of the schedule"] == 3 and others["dpm_2"] > 4 and others["dpm_adaptive"] > 20


def test_a_quantised_base_makes_the_same_clip(found: Found) -> None:
    assert found["quantised"]


def test_out_of_memory(found: Found) -> None:
    """At each stage: told with the remedy, nothing left on the device, and the next run is right."""
    for stage, case in found["out_of_memory"].items():
        assert "Start ComfyUI with --lowvram" in case["told"], stage
        assert case["left"] == 0 and case["right"], stage

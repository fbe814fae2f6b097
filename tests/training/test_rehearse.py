"""A rehearsal runs both stages at a config's sizes, whatever there is of models and data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerator import simulated
from tiny_models import save_tiny_folder

from mm_core.planning.plan import plan
from mm_core.planning.rehearse import rehearse
from mm_core.training.config import load_config

ROOT = Path(__file__).parents[2]

CONFIG = """
base: tiny
insightface_root: {faces}
face_pack: buffalo_sc
output: {folder}/nothing
width: 64
height: 64
validation_people: 1
gradient_checkpointing: true
image:
  {{data: none, features: none, frames: 1, identity_weight: 0.1, identity_start: 9, identity_timesteps: [0, 1000],
    loop: {{steps: 100, batch_size: 2}}}}
video:
  {{data: none, features: none, frames: 9, identity_weight: 0.1, identity_timesteps: [0, 1000],
    loop: {{steps: 100, batch_size: 2, micro_batch: 1}}}}
"""


@pytest.fixture
def config(tmp_path: Path, insightface_root: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(faces=insightface_root, folder=tmp_path))
    return path


def test_two_processes(config: Path) -> None:
    """Nothing of it is left, and the first of them tells the hours of both."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mm_core.training"]
    small = ["--set", "width=32", "height=32", "video.identity_weight=0"]
    command = [sys.executable, *launcher, "rehearse", "--config", str(config), "--steps", "2", *small]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    folder = ["--folder", str(config.parent), "--price-per-hour", "2.5"]
    told = subprocess.run([*command, *folder], cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    for stage in ("image", "video"):
        assert told.count(f"Stage {stage}, on 2 x cpu") == 1
    assert told.count("seconds a step") == told.count("validation/noise_loss") == 2
    assert told.count("for 100 steps; planned A100") == told.count("at 2.5 an hour; planned A100") == 2
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_on_a_device(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged steps, checkpointing, a validation and a resume of both stages: whatever is left behind would raise there.
    The parts that were on it are told; what rests there is what is planned."""
    stand_ins.install(monkeypatch.setattr)
    stand_ins.install_validation(monkeypatch.setattr)
    sizes = dict(id_proj_dim=9, can_hidden_dim=11, perceiver_dim=8, perceiver_depth=1, perceiver_dim_head=4)
    base = {"base": str(save_tiny_folder("5b", tmp_path / "base")), "adapter": str(sizes)}
    settings = load_config(config, base | {"width": "48", "height": "32"})
    with simulated() as accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState().device = accelerator.device
        told = rehearse(settings, 2, tmp_path / "rehearsal", price=2.5)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert told.count("on 1 x simgpu") == told.count("validation/base_loss") == told.count(", a step ") == 2
    memory = plan(replace(settings, video=replace(settings.video, identity_weight=0.0))).stages["video"].memory[0]
    rested = sum(memory.parts[part] for part in ("frozen weights", "trained weights", "Adam", "EMA"))
    found = [float(size) * 2**30 for size in re.findall(r"weights, Adam and EMA ([\de.-]+)", told)]
    assert found == [pytest.approx(rested, rel=0.02)] * 2

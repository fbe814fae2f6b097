"""A rehearsal runs both stages at a config's sizes, whatever there is of models and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.release.commands import main

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


def test_both_stages(tmp_path: Path, insightface_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(faces=insightface_root, folder=tmp_path))
    assert main(["rehearse", "--config", str(config), "--steps", "2", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for stage in ("image", "video"):
        assert f"Stage {stage}, on 1 x cpu" in told
    assert told.count("seconds a step") == told.count("validation/noise_loss") == 2
    assert told.count("identity loss") == 2 and "for 100 steps; planned A100" in told
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]  # nothing is left

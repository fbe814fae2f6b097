"""One command from an empty folder: rendered people, both stages, an adapter to publish, its scores."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.people.manifest import write_manifest
from lab.people.shards import RenderSettings, render_dataset
from mm_core.checkpoints.adapter_file import read_header
from mm_core.release.commands import main

ROOT = Path(__file__).parents[2]
CONFIG = """
base: tiny
insightface_root: {faces}
face_pack: buffalo_sc
output: {folder}/run
width: 64
height: 64
validation_people: 1
image:
  data: {folder}/people/images.jsonl
  features: {folder}/features/images
  frames: 1
  loop: {{steps: 2, batch_size: 2, log_every: 1}}
video:
  data: {folder}/people
  features: {folder}/features/clips
  frames: 9
  loop: {{steps: 2, batch_size: 2, log_every: 1}}
"""


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_command_trains_and_scores(
    tmp_path: Path, insightface_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed once the first stage has a checkpoint, the same command goes on, and prints where the report is."""
    people = tmp_path / "people"
    render_dataset(people, RenderSettings(first=0, stop=3, clips=2), processes=1)
    write_manifest(people, "images.jsonl", pictures=True)
    write_manifest(people, "manifest.jsonl", pictures=False)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(faces=insightface_root, folder=tmp_path))
    command = ["train", "--config", str(config)]

    process = subprocess.Popen([sys.executable, "-m", "mm_core.training", *command], cwd=ROOT)
    checkpoint = tmp_path / "run" / "image" / "checkpoints" / "step-00000002" / "adapter.safetensors"
    while not checkpoint.is_file():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.kill()
    process.wait()
    made = files(tmp_path / "features") | {str(checkpoint): checkpoint.stat().st_mtime_ns}

    assert main(command) == 0
    report = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert report == tmp_path / "run" / "scores" / "video-00000002" / "report.html" and report.is_file()
    whole = files(tmp_path)
    assert made.items() <= whole.items()
    adapter = tmp_path / "run" / "adapter" / "magic-mirror-tiny.safetensors"
    assert {tensor.dtype for tensor in load_file(adapter).values()} == {torch.float16}
    assert read_header(adapter).trained.stage == "video"
    card = (adapter.parent / "README.md").read_text()
    words = ("2 steps", "| id_similarity |", "| facesim_arc |", "6 samples", "non-commercial", "curve.svg")
    assert all(word in card for word in words)
    assert (adapter.parent / "curve.svg").read_text().count("<polyline") >= 2

    assert main(command) == 0
    again = files(tmp_path)
    changed = {path for path in whole if again[path] != whole[path]}
    assert again.keys() == whole.keys() and {Path(path).parent for path in changed} <= {adapter.parent}

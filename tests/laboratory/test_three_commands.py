"""docs/training.md's three commands, from raw footage with faults to the scores of what was trained on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lab.corpus.__main__ import became, plant, scores, table
from lab.corpus.footage import RATE, shot
from lab.corpus.pictures import KEPT
from lab.people.person import Person
from mm_core.checkpoints.adapter_file import read_header
from mm_core.data.features import Features
from mm_core.data.manifest import MANIFEST, read_manifest
from mm_core.evaluation.__main__ import main
from mm_core.release.commands import main as train
from mm_core.video import write_video

CONFIG = "mm_core/training/configs/tiny.yaml"


def run(repository: Path, *command: str) -> str:
    """A command as a user gives it; what it prints."""
    process = subprocess.run(
        [sys.executable, "-m", *command], cwd=repository, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def planted(folder: Path) -> dict[str, str]:
    """Footage of two people, of one of them with every fault; what should become of each clip."""
    truth = plant("video", folder, range(1))
    frames, caption = shot(Person.from_seed(1), 0)
    write_video(folder / "raw" / "other.mp4", frames, Fraction(RATE), quality=90)
    (folder / "raw" / "other.txt").write_text(caption)
    (folder / "raw" / "source.json").write_text('{"source": "our camera", "licence": "CC-BY-4.0"}')
    return truth | {"other.mp4#0": KEPT}


def test_from_raw_footage_to_scores(
    tmp_path: Path, insightface_root: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, data, output = planted(tmp_path), tmp_path / "videos", tmp_path / "run"
    faces = [f"measure.insightface_root={insightface_root}", "measure.face_pack=buffalo_sc", "keep.min_score=0.5"]
    few = "keep.references=1"  # each is looked at in both stages
    run(
        repository, "mm_core.curation", "video", str(tmp_path / "raw"), "--model", "tiny", "--out", str(data),
        "--workers", "1", "--set", *faces, few,
    )  # fmt: skip
    found, kept = became(data), read_manifest(data)
    assert all(score[2:] == (1, 1) for score in scores(truth, found).values()), table(truth, found)

    stages = ("image", "video")
    settings = [f"{stage}.{name}" for stage in stages for name in (f"data={data}", f"features={tmp_path / stage}")]
    settings += [f"{stage}.loop.steps=2" for stage in stages]
    settings += [f"insightface_root={insightface_root}", f"output={output}"]
    training = ["train", "--config", CONFIG, "--set", *settings]
    run(repository, "mm_core.training", *training)
    for stage in stages:
        features = Features.open(tmp_path / stage)
        assert [entry["id"] for entry in features.entries] == [sample.id for sample in kept]
    adapter = output / "adapter" / "magic-mirror-tiny.safetensors"
    trained = read_header(adapter).trained
    assert (trained.stage, trained.steps) == ("video", 2)
    people = Counter(sample.person for sample in kept)  # in the order of their first clips, whose names are hashes
    *_, left_out = people
    assert sorted(people.values()) == [1, 3]
    assert trained.data == f"{4 - people[left_out]} samples of videos; licences: CC-BY-4.0 (4)"

    benchmark = ["benchmark", "--set", str(output / "set"), "--out", str(output / "benchmark")]
    benchmark += ["--system", "magic-mirror", "--model", "tiny", "--adapter", str(adapter), "--steps", "1"]
    benchmark += ["--insightface-root", str(insightface_root), "--face-pack", "buffalo_sc"]
    told = run(repository, "mm_core.evaluation", *benchmark)
    assert told.splitlines()[-1] == str(output / "benchmark" / "table.csv")
    results = json.loads((output / "benchmark" / "magic-mirror" / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["adapter"] == str(trained) and len(results["clips"]) == 1
    assert "\n| magic-mirror | " in (output / "benchmark" / "table.md").read_text(encoding="utf-8")

    manifest = data / MANIFEST
    manifest.write_text("".join(manifest.read_text(encoding="utf-8").splitlines(True)[1:]), encoding="utf-8")
    assert train(training) == 2
    assert "was made with another manifest" in capsys.readouterr().err

    with safe_open(adapter, "pt") as file:
        header = file.metadata()
    further = json.loads(header["trained"]) | {"steps": 9}
    save_file(load_file(adapter), adapter, header | {"trained": json.dumps(further)})
    assert main(benchmark) == 2
    assert "made with weights trained: video stage, 2 steps" in capsys.readouterr().err

"""One command from an empty folder: rendered people, both stages, an adapter to publish, its scores."""

from __future__ import annotations

import signal
from pathlib import Path

import killed_run
import pytest
import torch
from processes import imported
from safetensors.torch import load_file

from lab import first_run
from mm_core.checkpoints.adapter_file import read_header

PARTS = (
    "lab.first_run.render_dataset", "lab.first_run.write_manifest", "mm_core.release.whole.precompute",
    "mm_core.release.whole.precompute", "mm_core.release.whole.train_stage",
    "mm_core.release.whole.train_stage", "mm_core.release.whole.export", "mm_core.release.whole.make_clips",
    "mm_core.release.whole.write_scores",
)  # fmt: skip
"""What the command does, in order; a part that is finished is not called again."""


def files(folder: Path) -> dict[str, int]:
    """When each was written; settings are at every start, the same ones."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "settings.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_one_command_trains_and_scores(
    tmp_path: Path, insightface_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed after each of its parts, the same command goes on, keeps what is there, and prints where the report is."""
    command = ["--folder", str(tmp_path), "--insightface-root", str(insightface_root), "--people", "3", "--steps", "2"]
    adapter = tmp_path / "run" / "adapter" / "magic-mirror-tiny.safetensors"
    before: dict[str, int] = {}
    for part in PARTS:
        process = imported().Process(target=killed_run.run, args=(*part.rsplit(".", 1), command))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended before {part}"
        made = files(tmp_path)
        assert before.items() <= made.items() and len(made) > len(before), part
        before = made

    assert first_run.main(command) == 0
    report = Path(capfd.readouterr().out.strip().splitlines()[-1])
    assert report == tmp_path / "run" / "scores" / "video-00000002" / "report.html" and report.is_file()
    made = files(tmp_path)
    changed = {Path(path).parent for path in before if made[path] != before[path]}
    assert before.keys() <= made.keys() and changed <= {report.parent, adapter.parent}
    assert {tensor.dtype for tensor in load_file(adapter).values()} == {torch.float16}
    assert read_header(adapter).trained.stage == "video"
    card = (adapter.parent / "README.md").read_text()
    assert all(word in card for word in ("2 steps", "| id_similarity |", "| facesim_arc |", "non-commercial"))
    assert (adapter.parent / "curve.svg").read_text().count("<polyline") >= 2

"""A run's folder that was cut, damaged, or made by a stranger: nothing of it runs; training goes on where it can."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import RegressionTask, config, losses

from mm_core.errors import CheckpointError, SettingError
from mm_core.training.loop import train
from mm_core.training.runs import METRICS, SETTINGS, checkpoints, latest_checkpoint

TRAINABLE, EXTRA = "trainable.safetensors", "average.pt"
RANDOM = "random_states_0.pkl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(RegressionTask(), config(keep=9), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 8 and 12."""
    return shutil.copytree(finished, tmp_path / "run")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("packed", [True, False], ids=["by torch", "by pickle"])
@pytest.mark.parametrize("file", [EXTRA, "custom_checkpoint_0.pkl", "optimizer.bin", RANDOM])
def test_a_checkpoint_runs_no_code(run: Path, tmp_path: Path, file: str, packed: bool) -> None:
    mark = tmp_path / "it ran"
    for checkpoint in checkpoints(run):
        if packed:
            torch.save({"state": Evil(mark)}, checkpoint / file)
        else:
            (checkpoint / file).write_bytes(pickle.dumps(Evil(mark)))
    with contextlib.suppress(CheckpointError):
        train(RegressionTask(), config(keep=9), run)
    assert not mark.exists()
    mark.with_name("control").touch()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would have


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


def nan(path: Path) -> None:
    weights = load_file(path)
    weights["trained.bias"][:] = torch.nan
    save_file(weights, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (TRAINABLE, cut), (TRAINABLE, Path.unlink), (TRAINABLE, nan), ("optimizer.bin", cut), (EXTRA, garble),
        (EXTRA, Path.unlink),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run: Path, finished: Path, caplog: pytest.LogCaptureFixture, file: str, damage: object
) -> None:
    last = latest_checkpoint(run)
    damage(last / file)
    with caplog.at_level(logging.WARNING):
        train(RegressionTask(), config(keep=9), run)
    assert f"{last} cannot be read" in caplog.text and "goes on from" in caplog.text
    assert losses(run) == losses(finished)  # bit for bit, as if it had not been
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(finished)]
    assert (last.parent / f"damaged-{last.name}").is_dir()


def test_without_a_whole_checkpoint_it_stops(run: Path) -> None:
    for checkpoint in checkpoints(run):
        cut(checkpoint / TRAINABLE)
    with pytest.raises(CheckpointError, match=r"None of the checkpoints .*step-00000012: .*begin anew"):
        train(RegressionTask(), config(keep=9), run)
    assert len(checkpoints(run)) == 3  # nothing was put aside


@pytest.mark.parametrize("content", ["{", "[]", "[" * 10_000, "\ud800"])
def test_damaged_settings_are_told(run: Path, content: str) -> None:
    (run / SETTINGS).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(SettingError, match=r"settings\.json .*remove the file"):
        train(RegressionTask(), config(keep=9), run)


@pytest.mark.parametrize("line", ["{", '{"step": "x"}', "\udc80"])
def test_a_damaged_line_of_measurements_is_told(run: Path, line: str) -> None:
    lines = (run / METRICS).read_bytes().splitlines()
    lines[4] = line.encode("utf-8", "surrogateescape")
    (run / METRICS).write_bytes(b"\n".join(lines))
    with pytest.raises(SettingError, match=r"metrics\.jsonl is damaged in line 5"):
        train(RegressionTask(), config(keep=9), run)


def test_the_line_that_a_kill_cut_short_is_dropped(run: Path, finished: Path) -> None:
    with (run / METRICS).open("ab") as file:
        file.write(b'{"step": 12, "lo\xc3')
    train(RegressionTask(), config(keep=9), run)
    assert losses(run) == losses(finished)
    assert json.loads((run / METRICS).read_text().splitlines()[-1])["step"] == 12

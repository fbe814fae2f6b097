"""kill -9 at random times in training and in precomputing: `python -m tests.campaign.kills --kills 100`.

After each kill nothing is half under a final name; the next start goes on, and ends with what an undisturbed run has.
Findings: a file that does not read, and another result. Other writers: tests/test_files.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from lab.people.manifest import write_manifest
from lab.people.shards import RenderSettings, render_dataset
from mm_core.data import precompute as precomputing
from mm_core.data.manifest import MANIFEST
from mm_core.release.prepare import feature_settings
from mm_core.training.config import StageConfig, TrainingConfig
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.runs import METRICS, SETTINGS, checkpoints

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]
from test_loop import RegressionTask, config, losses  # noqa: E402

STEPS = 120
Run = Callable[[Path], object]


def training(folder: Path) -> None:
    train(RegressionTask(), config(steps=STEPS, save_every=2, keep=3), folder)


def read_run(folder: Path) -> None:
    """All that a run has written and named; raises where one of it is half. Not metrics' last line: it is appended."""
    for checkpoint in checkpoints(folder):
        for file in checkpoint.rglob("*.safetensors"):
            load_file(file)
        for file in (*checkpoint.rglob("*.bin"), *checkpoint.rglob("state_*.pt")):
            torch.load(file, weights_only=True)
    if (folder / SETTINGS).is_file():
        json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if (folder / METRICS).is_file():
        for line in (folder / METRICS).read_bytes().split(b"\n")[:-1]:
            json.loads(line)


def precompute_config(folder: Path, insightface_root: Path) -> TrainingConfig:
    """A small data set, written into a folder; its features go into that of a run."""
    render_dataset(folder, RenderSettings(first=0, stop=2, clips=3), processes=1)
    write_manifest(folder, MANIFEST, pictures=False)
    stage = {"data": str(folder), "features": "", "loop": LoopConfig(steps=1, batch_size=1)}
    return TrainingConfig(
        base="tiny", output=str(folder), width=64, height=64, image=StageConfig(frames=1, **stage),
        video=StageConfig(frames=9, **stage), insightface_root=str(insightface_root), face_pack="buffalo_sc",
    )  # fmt: skip


def read_features(folder: Path) -> None:
    for file in folder.glob("[!.]*.safetensors"):
        load_file(file)
    for file in folder.glob("[!.]*.json"):
        json.loads(file.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("[!.]*")) if file.is_file()}


def kill_often(run: Run, read: Run, result: Run, kills: int, seed: int, folder: Path) -> tuple[int, int, list[str]]:
    """Kill a run so many times, in as many folders as it takes. How many ended, after how many halves; findings."""
    random_, findings, ended, halves = random.Random(seed), [], 0, 0
    with child(run, folder / "whole") as number:
        begun = time.monotonic()
        assert os.waitpid(number, 0)[1] == 0, "the undisturbed run failed"
    lasts, wanted, current = time.monotonic() - begun, result(folder / "whole"), folder / "0"
    killed = 0
    while killed < kills:
        with child(run, current) as number:
            time.sleep(random_.uniform(0, lasts / 2))
            os.kill(number, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        killed += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            findings.append(f"a start after kill {killed} failed with {status}")
            shutil.rmtree(current)
        try:
            read(current)
        except Exception as error:  # of any reader
            findings.append(f"after kill {killed}: {type(error).__name__}: {error}")
        halves += any(current.rglob(".*"))
        if status == 0:
            ended += 1
            if result(current) != wanted:
                findings.append(f"another result after kill {killed}")
            current = folder / str(ended)
    with child(run, current) as number:
        if os.waitpid(number, 0)[1] or result(current) != wanted:
            findings.append("the last start did not end with the same result")
    return ended + 1, halves, findings


@contextmanager
def child(run: Run, folder: Path) -> Iterator[int]:
    """A forked process that runs: a fresh Python would take seconds to import what it needs."""
    number = os.fork()
    if not number:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        try:
            run(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    yield number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--insightface-root", type=Path, required=True, help="holds models/<pack>/*.onnx")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    precomputing.SAMPLES_PER_SHARD = 1
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        made = precompute_config(root / "data", args.insightface_root)

        def precompute(folder: Path) -> None:
            precomputing.precompute(feature_settings(made, "video"), folder)

        for name, run, read, result in (
            ("training: checkpoints, settings, metrics", training, read_run, losses),
            ("precomputing: shards, index, settings", precompute, read_features, contents),
        ):
            folder = root / name.partition(":")[0]
            folder.mkdir()
            ended, halves, findings = kill_often(run, read, result, args.kills, args.seed, folder)
            print(f"{name}: {args.kills} kills, {halves} left something unfinished, {ended} runs ended, {findings=}")
            failed |= bool(findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The training loop: exact resume, any number of processes, whole checkpoints, what it measures."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_core.errors import MagicMirrorError, SettingError
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.randomness import generator_for, shuffled
from mm_core.training.runs import METRICS, checkpoints, is_finished, latest_checkpoint
from mm_core.training.task import Task

ROOT = Path(__file__).parents[2]


class Regression(nn.Module):
    """A frozen and a trained layer; the loss of a sample is the squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.trained = nn.Linear(5, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (self.trained(self.frozen(batch["x"]).tanh())[:, 0] - batch["y"]).square()
        if len(cliffs := batch["cliffs"]):  # where a square root begins: 0, with a gradient that is no number
            error = error.index_add(0, cliffs, (0 * error[cliffs]).sqrt())
        return {"loss": error, "noise_loss": error, "timestep": batch["timestep"]}


class RegressionTask(Task):
    """slow: seconds a batch takes, for tests that kill. broken_from: the first sample that is not a number. cliff: a
    sample with a finite loss and a gradient that is none. processes: how many there must be; their numbers are written
    into `pids`. settings: what a run goes on with only."""

    def __init__(
        self,
        slow: float = 0.0,
        broken_from: int | None = None,
        cliff: int | None = None,
        processes: int = 1,
        pids: str | None = None,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.model, self.slow, self.broken_from, self.cliff = Regression(), slow, broken_from, cliff
        self.processes, self.pids, self.settings = processes, pids, settings
        self.validated: list[int] = []

    def batch(self, samples: range) -> dict[str, Tensor]:
        assert PartialState().num_processes == self.processes
        if self.pids:
            Path(f"{self.pids}-{PartialState().process_index}").write_text(str(os.getpid()))
            self.pids = None
        time.sleep(self.slow)
        x = torch.stack([torch.randn(6, generator=generator_for(3, shuffled(n, 50, 3))) for n in samples])
        if self.broken_from is not None and samples.stop > self.broken_from:
            x[-1] = torch.nan
        with torch.no_grad():
            y = self.model.frozen(x).tanh().sum(dim=1)
        cliffs = torch.tensor([row for row, n in enumerate(samples) if n == self.cliff], dtype=torch.long)
        return {"x": x, "y": y, "timestep": torch.tensor([n * 37 % 1000 for n in samples]), "cliffs": cliffs}

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        save_file(dict(weights), path / "exported.safetensors")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        self.validated.append(step)
        return {"bias": self.model.trained.bias.item()}


def config(**changes: object) -> LoopConfig:
    settings = dict(steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2)
    settings |= dict(ema_decay=0.9, log_every=1, save_every=4)
    return LoopConfig(**(settings | changes))


def losses(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    steps = {line.pop("step"): line for line in map(json.loads, lines) if "loss" in line}
    return {step: {n: v for n, v in line.items() if not n.startswith("speed/")} for step, line in steps.items()}


def test_a_run_learns_and_its_frozen_part_stays(tmp_path: Path) -> None:
    task = RegressionTask()
    frozen = {name: tensor.clone() for name, tensor in task.model.frozen.state_dict().items()}
    train(task, config(steps=150, learning_rate=0.05), tmp_path)
    measured = losses(tmp_path)
    assert measured[150]["loss"] < 0.05 * measured[1]["loss"]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in task.model.frozen.state_dict().items())
    assert set(load_file(latest_checkpoint(tmp_path) / "exported.safetensors")) == {"trained.weight", "trained.bias"}


@pytest.mark.parametrize("stop", [4, 8])
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    """A run whose later checkpoints are gone goes on from the last: same losses, gradients and weights, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(RegressionTask(), config(keep=9), whole)
    train(RegressionTask(), config(keep=9), cut)
    for checkpoint in checkpoints(cut):
        if checkpoint.name > f"step-{stop:08d}":
            for file in checkpoint.rglob("*"):
                file.unlink()
            checkpoint.rmdir()
    with (cut / METRICS).open("a") as file:
        file.write('{"step": 13, "lo')  # what a kill in the middle of a line leaves
    train(RegressionTask(), config(keep=9), cut)
    assert losses(cut) == losses(whole)
    ours, theirs = (load_file(latest_checkpoint(f) / "exported.safetensors") for f in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


SCRIPT = """
import sys; from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_loop import RegressionTask, config
from mm_core.training.loop import train
for folder, task in {runs!r}.items():
    train(RegressionTask(**task), config(**{changes!r}), Path(folder))
"""


def start(
    *folders: Path,
    processes: int = 1,
    task: Mapping[str, object] = MappingProxyType({}),
    last: Mapping[str, object] = MappingProxyType({}),
    **changes: object,
) -> subprocess.Popen[str]:
    """Runs of a task, one after the other, the last of another one, in processes of their own.

    `accelerate launch --cpu --num_processes 2` starts one.
    """
    runs = {str(folder): dict(task) | {"processes": processes} for folder in folders}
    runs[str(folders[-1])] |= last
    code = SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent), runs=runs, changes=changes)
    script = folders[0].with_suffix(".py")
    script.write_text(code, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    while not (folder / METRICS).is_file() or len((folder / METRICS).read_bytes().splitlines()) < steps:
        assert process.poll() is None, "the run ended early"
        time.sleep(0.005)


def test_stop_at_any_moment(tmp_path: Path) -> None:
    """Killed without warning, then by SIGTERM, as a cluster's scheduler sends it, which saves the last step, a run ends
    with the losses of one that was left alone."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(RegressionTask(), config(steps=40), whole)
    process = start(stopped, task={"slow": 0.05}, steps=40)
    wait_for_steps(process, stopped, 9)
    process.kill()
    process.wait()
    process = start(stopped, task={"slow": 0.05}, steps=40, save_every=40)
    wait_for_steps(process, stopped, 23)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60)
    assert 23 <= int(latest_checkpoint(stopped).name.removeprefix("step-")) == max(losses(stopped)) < 40
    train(RegressionTask(), config(steps=40), stopped)
    assert losses(stopped) == losses(whole)
    assert not list((stopped / "checkpoints").glob(".*"))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two processes, accumulation, and readers of batches beside them give one process's losses for the same batch; a
    bad gradient in one of them stops both, with the message, and nothing is saved."""
    one, two, accumulated, bad = (tmp_path / name for name in ("one", "two", "accumulated", "bad"))
    train(RegressionTask(), config(), one)
    # One after the other, as stages are.
    process = start(two, following := tmp_path / "following", bad, processes=2, last={"cliff": 55})
    assert process.wait(timeout=240)
    assert "gradient's norm is nan at step 6" in process.stderr.read()
    assert latest_checkpoint(bad).name == "step-00000004"
    assert losses(following)[12]["loss"] == losses(two)[12]["loss"]
    train(RegressionTask(), config(micro_batch=2, workers=2), accumulated)
    for folder in (two, accumulated):
        for step, values in losses(one).items():
            assert losses(folder)[step] == pytest.approx(values, rel=1e-5, abs=1e-7)


def test_loss_that_is_not_a_number_stops_before_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(MagicMirrorError, match="at step 6: it must be finite"):
        train(RegressionTask(broken_from=50), config(), tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_checkpoint_that_does_not_fit_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """The checkpoint before stays, and the run goes on from it when there is room."""
    task, batch, soft = RegressionTask(), RegressionTask.batch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_a_small_disk(samples: range) -> dict[str, Tensor]:
        if samples.start == 11 * 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft[1]))
        return batch(task, samples)

    task.batch = with_a_small_disk
    settings = config(log_every=100, save_every=6, ema_decay=0.0)
    try:
        with pytest.raises(MagicMirrorError, match=r"step 12 could not be written .*Free some space"):
            train(task, settings, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert train(RegressionTask(), settings, tmp_path).name == "step-00000012"


def test_a_gradient_that_is_not_a_number_stops_before_it_is_saved(tmp_path: Path) -> None:
    """Sample 50 is in step 6. As the message says, a resume takes a lower learning rate, and a step to skip."""
    with pytest.raises(MagicMirrorError, match=r"gradient's norm is nan at step 6: .*loop\.skip_steps"):
        train(RegressionTask(cliff=50), config(), tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000004"
    with pytest.raises(MagicMirrorError, match="gradient's norm"):
        train(RegressionTask(cliff=50), config(learning_rate=5e-3), tmp_path)
    last = train(RegressionTask(cliff=50), config(learning_rate=5e-3, skip_steps=(6,)), tmp_path)
    assert last.name == "step-00000012"
    assert set(losses(tmp_path)) == {*range(1, 7), *range(8, 13)}
    exported = load_file(last / "exported.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())


def test_a_run_goes_on_with_the_same_task_only(tmp_path: Path) -> None:
    train(RegressionTask(settings={"ablation": "ours", "held_out": ["a", "b"]}), config(), tmp_path)
    with pytest.raises(SettingError, match="holds a run with ablation ours, not A"):
        train(RegressionTask(settings={"ablation": "A", "held_out": ["a", "b"]}), config(), tmp_path)
    with pytest.raises(SettingError, match="held_out"):
        train(RegressionTask(settings={"ablation": "ours", "held_out": ["b"]}), config(), tmp_path)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_in_pieces_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate tells of what started it."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType(kind)))
    with pytest.raises(SettingError, match=f"{kind} splits the weights.*torchrun"):
        train(RegressionTask(), config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_signals_to_two_processes(tmp_path: Path) -> None:
    """Whichever gets SIGTERM, and when: both stop after the same step, with a checkpoint, and the run goes on there.
    Killed without warning, one takes the other with it, and the run goes on from the checkpoint before."""
    folder, step = tmp_path / "run", 0
    for signalled in ("one", "both, apart", "one, killed"):
        pids, killed = tmp_path / signalled, signalled == "one, killed"
        save_every = 5 if killed else 400
        process = start(folder, processes=2, task={"slow": 0.02, "pids": str(pids)}, steps=400, save_every=save_every)
        wait_for_steps(process, folder, step + (12 if killed else 3))
        first, second = (int(Path(f"{pids}-{rank}").read_text()) for rank in (0, 1))
        os.kill(second, signal.SIGKILL if killed else signal.SIGTERM)
        if signalled == "both, apart":
            time.sleep(0.03)
            os.kill(first, signal.SIGTERM)
        assert process.wait(timeout=120)
        before, step = step, int(latest_checkpoint(folder).name.removeprefix("step-"))
        assert before + 3 <= step <= max(losses(folder)) < 400
        assert step == max(losses(folder)) or killed
    again = start(folder, processes=2, steps=400, save_every=400)
    assert again.wait(timeout=240) == 0, again.stderr.read()
    assert is_finished(folder, 400) and list(losses(folder)) == list(range(1, 401))


def test_checkpoints_roll_and_validation_sees_the_average(tmp_path: Path) -> None:
    task = RegressionTask()
    train(task, config(validate_every=5), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000008", "step-00000012"]
    assert task.validated == [5, 10, 12]
    exported = load_file(latest_checkpoint(tmp_path) / "exported.safetensors")
    last = json.loads((tmp_path / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    assert last["validation/bias"] == pytest.approx(float(exported["trained.bias"]))
    assert task.model.trained.bias.item() != pytest.approx(last["validation/bias"])


def test_what_is_measured(tmp_path: Path) -> None:
    """Losses by noise level add up to the loss; gradients are told by part."""
    train(RegressionTask(), config(), tmp_path)
    values = losses(tmp_path)[1]
    buckets = {name: value for name, value in values.items() if name.startswith("noise_loss/t")}
    timesteps = torch.tensor([n * 37 % 1000 for n in range(8)])
    counts = torch.bincount(timesteps // 100, minlength=10)
    weighted = sum(value * int(counts[int(name[-7]) if name[-7] != "t" else 0]) for name, value in buckets.items())
    assert weighted / 8 == pytest.approx(values["loss"])
    assert {"gradient/trained", "gradient/all", "learning_rate"} <= values.keys()
    measured = json.loads((tmp_path / METRICS).read_text(encoding="utf-8").splitlines()[0])
    assert measured["speed/samples_a_second"] > 0 and 0 < measured["speed/waiting_for_data"] < 1


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="batch_size 8 does not divide into 1 process"):
        train(RegressionTask(), config(micro_batch=3), tmp_path / "batch")
    train(RegressionTask(), config(), tmp_path / "run")
    with pytest.raises(SettingError, match=r"holds a run with seed 0, not 1"):
        train(RegressionTask(), config(seed=1), tmp_path / "run")
    with pytest.raises(ValueError, match="ema_decay"):
        config(ema_decay=1.0)


def test_each_epoch_is_a_permutation() -> None:
    first, second = ([shuffled(n, 50, 3) for n in range(start, start + 50)] for start in (0, 50))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second

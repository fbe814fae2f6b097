"""The one training loop: whatever is trained here, from the VAE of the small model to the 5B adapter, runs through it.

Every sample of a run has a number, counted from 0, and all of its randomness (which clip, timestep, noise, dropout)
follows from the run's seed and that number. So a run does not depend on the number of processes, and a run that was
killed goes on exactly as if it had not been: there is no sampler or random state to restore.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, send_to_device
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import MagicMirrorError, SettingError
from ..files import PARTIAL, append_lines, write_json
from .loop_config import LoopConfig
from .measurements import Measurements
from .runs import (
    CHECKPOINTS,
    METRICS,
    SETTINGS,
    check_settings,
    checkpoint_of,
    checkpoints,
    forget_after,
    latest_checkpoint,
)
from .saved_state import SavedState
from .task import Task

_log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: one may have more of a validation to do, which takes longer than the ten
minutes that NCCL would wait."""
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def train(task: Task, config: LoopConfig, folder: Path, stop: threading.Event | None = None) -> Path:
    """Train, or go on where a killed run stopped; returns the folder of the last checkpoint.

    folder: gets `checkpoints/step-*` (each whole or not there), `metrics.jsonl`, TensorBoard's files, `settings.json`.
    stop: once it is set, in any process, the run ends as a signal ends it: KeyboardInterrupt after a checkpoint.

    Raises:
        SettingError: the batch does not divide, or the folder holds a run with other settings.
        MagicMirrorError: a loss that is not finite (nothing after the last checkpoint is written), a full disk.
    """
    return _Run(task, config, folder, stop or threading.Event()).run()


class _Batches(Dataset):
    """By the numbers of their samples."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, samples: range) -> Any:
        return self.task.batch(samples)


class _Run:
    def __init__(self, task: Task, config: LoopConfig, folder: Path, stop: threading.Event) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.accelerator = _accelerator(config, folder)
        self.accumulation = config.accumulation(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {**task.settings, **asdict(config)}
        check_settings(folder, wanted)
        if self.accelerator.is_main_process:
            write_json(folder / SETTINGS, wanted)
        optimizers = task.optimizers(config)
        if config.compile:
            torch.compiler.reset()  # what a run before this one compiled counts towards a limit
            task.compiled.forward = torch.compile(task.compiled.forward)
        # What is frozen is the same in all processes, and not every backend sends 8-bit floats.
        frozen = [name for name, parameter in task.model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task.model, frozen)
        self.model, *self.optimizers = self.accelerator.prepare(task.model, *optimizers)
        self.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay else None
        self.saved = SavedState(self.accelerator, folder, self.trained, task, self.ema)
        self.measured = Measurements(self.accelerator.device)
        self.signalled = stop
        self.stopping = False
        """All processes stop, after the same step: one of them was signalled."""

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        start = self._resume()
        accelerator.init_trackers("training")
        self.model.train()
        bar = tqdm(
            range(start, config.steps), initial=start, total=config.steps, disable=not accelerator.is_main_process
        )
        batches = iter(self._batches(start))
        with self._stop_on_signal():
            for step in bar:
                logging_step = (step + 1) % config.log_every == 0
                norms = {}
                if step not in config.skip_steps:
                    with self.measured.timed("step"):
                        norms = self._step(step, batches, with_norms=logging_step)
                done = step + 1
                if logging_step:
                    self._log(done, norms, bar)
                last = done == config.steps or self.stopping
                if last or done % config.save_every == 0:
                    self._save(done)
                if config.validate_every and (done % config.validate_every == 0 or done == config.steps):
                    self._validate(done)
                if self.stopping:
                    raise KeyboardInterrupt
        for tracker in accelerator.trackers:  # not `end_training`, after which the next stage finds no process group
            tracker.finish()
        return latest_checkpoint(self.folder)

    def _batches(self, start: int) -> DataLoader:
        """Those of this process, in order, of all steps from `start` on."""
        config, processes = self.config, self.accelerator.num_processes
        micro = config.batch_size // (self.accumulation * processes)
        firsts = [
            step * config.batch_size + (turn * processes + self.accelerator.process_index) * micro
            for step in range(start, config.steps)
            if step not in config.skip_steps
            for turn in range(self.accumulation)
        ]
        return DataLoader(
            _Batches(self.task),
            batch_size=None,
            sampler=[range(first, first + micro) for first in firsts],
            num_workers=config.workers,
            collate_fn=_as_it_is,
            pin_memory=self.accelerator.device.type == "cuda",
            # The task holds models: they are shared with its readers, not copied.
            multiprocessing_context="fork" if config.workers else None,
        )

    def _step(self, step: int, batches: Iterator[Any], with_norms: bool) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = config.learning_rate_at(step)
        for turn in range(self.accumulation):
            with self.measured.timed("data"):
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            # By the turn, not by accelerate's own count, which a resumed run would have to restore.
            accelerator.gradient_state._set_sync_gradients(turn == self.accumulation - 1)
            with accelerator.no_sync(self.model) if turn < self.accumulation - 1 else nullcontext():
                with accelerator.autocast():
                    values = self.model(batch)
                accelerator.backward(values["loss"].float().mean())
            self._collect(values, step)
        norms = self._gradient_norms() if with_norms else {}
        norms["all"] = float(accelerator.clip_grad_norm_(self.parameters, config.clip_norm))
        if not math.isfinite(norms["all"]) and accelerator.scaler is None:  # fp16's scaler passes such a step over
            raise self._stuck("The gradient's norm", norms["all"], step)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        return norms

    def _collect(self, values: Mapping[str, Tensor], step: int) -> None:
        """Note what was measured, in all processes."""
        # A signal reaches one process: it goes along, so that all stop after the same step.
        values = {**values, "stopping": torch.full_like(values["loss"], float(self.signalled.is_set()))}
        names = sorted(values)
        table = torch.stack([values[name].detach().float() for name in names])  # (names, B)
        table = self.accelerator.gather(table.T.contiguous()).T.double().cpu()
        columns = dict(zip(names, table))
        self.stopping |= bool(columns.pop("stopping").any())
        if not columns["loss"].isfinite().all():
            raise self._stuck("The loss", columns["loss"].tolist(), step)
        self.measured.add(columns)

    def _stuck(self, what: str, value: object, step: int) -> MagicMirrorError:
        return MagicMirrorError(
            f"{what} is {value} at step {step}: it must be finite. Run the same command again with a lower "
            f"loop.learning_rate, or with {step} in loop.skip_steps if this batch is what is bad; it goes on from the "
            f"last checkpoint in {self.folder / CHECKPOINTS}."
        )

    def _gradient_norms(self) -> dict[str, float]:
        """The norm of each part's gradient, before clipping; block numbers are left out of the names."""
        squares: defaultdict[str, float] = defaultdict(float)
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                squares[_part(name)] += float(parameter.grad.norm()) ** 2
        scale = float(self.accelerator.scaler.get_scale()) if self.accelerator.scaler is not None else 1.0
        return {name: math.sqrt(square) / scale for name, square in squares.items()}

    def _log(self, step: int, norms: dict[str, float], bar: tqdm) -> None:
        values = self.measured.take()
        if not values:  # all steps were skipped
            return
        values |= {f"gradient/{name}": norm for name, norm in norms.items()}
        values["learning_rate"] = self.config.learning_rate_at(step - 1)
        self._write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other numbers
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            append_lines(self.folder / METRICS, [json.dumps({"step": step} | values)])

    def _validate(self, step: int) -> None:
        folder = self.folder / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.model.eval()
        # Clips have other shapes than batches: compiled for both, the model would reach the limit.
        with self._averaged(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            values = self.task.validate(step, folder)
        self.model.train()
        self._write(step, {f"validation/{name}": value for name, value in values.items()})
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running average in the model's place."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _save(self, step: int) -> None:
        """A checkpoint, under its name only when it is whole; the oldest go."""
        final = checkpoint_of(self.folder, step)
        partial = final.with_name(f".{final.name}{PARTIAL}")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()  # every process writes a file of its own into it
            if self.accelerator.is_main_process:
                with self._averaged():
                    weights = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
                self.task.export(weights, partial, step)
        except (OSError, RuntimeError, SafetensorError, MagicMirrorError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # which may be what fills the disk
            raise MagicMirrorError(
                f"The checkpoint of step {step} could not be written to {partial.parent}: {error}. Free some space and "
                "run the same command again; it goes on from the checkpoint before."
            ) from error
        if self.accelerator.is_main_process:
            partial.rename(final)
            for old in checkpoints(self.folder)[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; returns the number of steps done."""
        start = self.saved.resume()
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        if self.accelerator.is_main_process:
            for left_by_a_killed_run in (self.folder / CHECKPOINTS).glob(f".*{PARTIAL}"):
                shutil.rmtree(left_by_a_killed_run)
            forget_after(self.folder / METRICS, start)
        return start

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Ctrl-C, or a scheduler's SIGTERM, ends the run after the step, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda *_: self.signalled.set()) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before):
                signal.signal(number, handler)


def _accelerator(config: LoopConfig, folder: Path) -> Accelerator:
    """Raises SettingError for a launch that splits the weights."""
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        # An ablation leaves parts of the adapter without a gradient.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    if accelerator.distributed_type in _SHARDING:
        raise SettingError(
            f"{accelerator.distributed_type} splits the weights; training keeps them whole on each device: "
            "start it with torchrun, or with accelerate launch --multi_gpu."
        )
    return accelerator


def _part(name: str) -> str:
    """`adapter.blocks.4.can.linear_1.weight` -> `adapter.blocks.can`."""
    return ".".join(word for word in name.split(".")[:4] if not word.isdigit() and word not in ("weight", "bias"))


def _as_it_is(batch: Any) -> Any:
    return batch

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
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch import compile as compiled
from tqdm import tqdm

from ..errors import MagicMirrorError, SettingError
from ..files import PARTIAL, append_lines, write_json
from .loop_config import LoopConfig
from .optimizer import OPTIMIZERS, parameter_groups
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

_log = logging.getLogger(__name__)

_TIMESTEP_BUCKETS = 10
_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. They wait for the first one's validation, which takes longer than the ten
minutes that NCCL would."""


class Task(Protocol):
    """What is trained."""

    model: nn.Module
    """Its `forward(batch)` returns per-sample values by name, (B,) each; the mean of `loss` is minimised. The ones with
    NaN for a sample are averaged over the others. Parameters that require gradients are trained, no others."""

    state: Any | None
    """Optional: what else a resumed run needs, with `state_dict` and `load_state_dict`."""

    settings: Mapping[str, Any]
    """Optional: what else the numbers of a run depend on, by name. A run goes on only with the same."""

    def batch(self, samples: range) -> Any:
        """The samples with these numbers, as nested dicts and lists of tensors; the same whenever and by whom ever."""

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        """Write the trained weights, by the model's parameter names, in the format others read, into a folder."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Measure the model as it is (its weights are the average while this runs); files go into the folder."""


def train(task: Task, config: LoopConfig, folder: Path) -> Path:
    """Train, or go on where a killed run stopped; returns the folder of the last checkpoint.

    folder: gets `checkpoints/step-*` (each whole or not there), `metrics.jsonl`, TensorBoard's files, `settings.json`.

    Raises:
        SettingError: the batch does not divide, or the folder holds a run with other settings.
        MagicMirrorError: a loss that is not finite (nothing after the last checkpoint is written), a full disk.
    """
    return _Run(task, config, folder).run()


class _Run:
    def __init__(self, task: Task, config: LoopConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
            # A process whose samples all dropped the identity has no gradient for the adapter.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
        if config.optimizer == "muon" and self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise SettingError("muon needs whole matrices on each device: with FSDP or DeepSpeed choose adamw.")
        self.accumulation = config.accumulation(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {**getattr(task, "settings", {}), **asdict(config)}
        check_settings(folder, wanted)
        if self.accelerator.is_main_process:
            write_json(folder / SETTINGS, wanted)
        self.names = [name for name, p in task.model.named_parameters() if p.requires_grad]
        groups = parameter_groups(task.model, config.weight_decay)
        optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, betas=config.betas)
        if config.compile:
            torch.compiler.reset()  # what a run before this one compiled counts towards a limit
            part = getattr(task.model, "compiled", task.model)
            part.forward = compiled(part.forward)
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay else None
        extras = [extra for extra in (self.ema, getattr(task, "state", None)) if extra is not None]
        self.saved = SavedState(self.accelerator, folder, self.names, extras)
        self.signalled = threading.Event()
        self.stopping = False
        """All processes stop, after the same step: one of them was signalled."""

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        start = self._resume()
        accelerator.init_trackers("training")
        self.model.train()
        sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        bar = tqdm(
            range(start, config.steps), initial=start, total=config.steps, disable=not accelerator.is_main_process
        )
        with self._stop_on_signal():
            for step in bar:
                logging_step = (step + 1) % config.log_every == 0
                skipped = step in config.skip_steps
                norms = {} if skipped else self._step(step, sums, with_norms=logging_step)
                done = step + 1
                if logging_step and sums:
                    self._log(done, sums, norms, bar)
                last = done == config.steps or self.stopping
                if last or done % config.save_every == 0:
                    self._save(done)
                if config.validate_every and (done % config.validate_every == 0 or done == config.steps):
                    self._validate(done)
                if self.stopping:
                    raise KeyboardInterrupt
        accelerator.end_training()
        return latest_checkpoint(self.folder)

    def _step(self, step: int, sums: dict[str, list[float]], with_norms: bool) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        micro = config.batch_size // (self.accumulation * accelerator.num_processes)
        norms: dict[str, float] = {}
        for turn in range(self.accumulation):
            first = step * config.batch_size + (turn * accelerator.num_processes + accelerator.process_index) * micro
            batch = _to(self.task.batch(range(first, first + micro)), accelerator.device)
            # By the turn, not by accelerate's own count, which a resumed run would have to restore.
            accelerator.gradient_state._set_sync_gradients(turn == self.accumulation - 1)
            with accelerator.no_sync(self.model) if turn < self.accumulation - 1 else nullcontext():
                with accelerator.autocast():
                    values = self.model(batch)
                loss = values["loss"].float().mean()
                accelerator.backward(loss)
            self._collect(values, sums, step)
        if with_norms:
            norms = self._gradient_norms()
        norms["all"] = float(accelerator.clip_grad_norm_(self.parameters, config.clip_norm))
        if not math.isfinite(norms["all"]) and accelerator.scaler is None:  # fp16's scaler passes such a step over
            raise self._stuck("The gradient's norm", norms["all"], step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        return norms

    def _collect(self, values: Mapping[str, Tensor], sums: dict[str, list[float]], step: int) -> None:
        """Add up what was measured, over all processes, where it was measured."""
        # A signal reaches one process: it goes along, so that all stop after the same step.
        values = {**values, "stopping": torch.full_like(values["loss"], float(self.signalled.is_set()))}
        names = sorted(values)
        table = torch.stack([values[name].detach().float() for name in names])  # (names, B)
        table = self.accelerator.gather(table.T.contiguous()).T.double().cpu()
        columns = dict(zip(names, table))
        self.stopping |= bool(columns.pop("stopping").any())
        if not columns["loss"].isfinite().all():
            raise self._stuck("The loss", columns["loss"].tolist(), step)
        timesteps = columns.pop("timestep", None)
        for name, column in columns.items():
            _add(sums, name, column)
        if timesteps is not None:
            buckets = (timesteps / 1000 * _TIMESTEP_BUCKETS).long().clamp(0, _TIMESTEP_BUCKETS - 1)
            for bucket in buckets.unique().tolist():
                name = f"noise_loss/t{bucket * 100:03d}-{bucket * 100 + 99:03d}"
                _add(sums, name, columns.get("noise_loss", columns["loss"])[buckets == bucket])

    def _stuck(self, what: str, value: object, step: int) -> MagicMirrorError:
        return MagicMirrorError(
            f"{what} is {value} at step {step}: it must be finite. Run the same command again with a lower "
            f"loop.learning_rate, or with {step} in loop.skip_steps if this batch is what is bad; it goes on from the "
            f"last checkpoint in {self.folder / CHECKPOINTS}."
        )

    def _gradient_norms(self) -> dict[str, float]:
        """The norm of each part's gradient, before clipping; block numbers are left out of the names."""
        squares: defaultdict[str, float] = defaultdict(float)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm()
                squares[_part(name)] += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        scale = float(self.accelerator.scaler.get_scale()) if self.accelerator.scaler is not None else 1.0
        return {name: math.sqrt(square) / scale for name, square in squares.items()}

    def _log(self, step: int, sums: dict[str, list[float]], norms: dict[str, float], bar: tqdm) -> None:
        values = {name: total / count for name, (total, count) in sorted(sums.items()) if count}
        values |= {f"gradient/{name}": norm for name, norm in norms.items()}
        values["learning_rate"] = self.config.learning_rate_at(step - 1)
        sums.clear()
        self._write(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            append_lines(self.folder / METRICS, [json.dumps({"step": step} | values)])

    def _validate(self, step: int) -> None:
        folder = self.folder / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
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
            with self._averaged():
                weights = self._trainable_weights()
        except (OSError, RuntimeError) as error:
            raise MagicMirrorError(
                f"The checkpoint of step {step} could not be written to {partial.parent}: {error}. Free some space and "
                "run the same command again; it goes on from the checkpoint before."
            ) from error
        if self.accelerator.is_main_process:
            self.task.export(weights, partial, step)
            partial.rename(final)
            for old in checkpoints(self.folder)[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _trainable_weights(self) -> dict[str, Tensor]:
        """Trained parameters by name, whole, on the CPU."""
        state = self.accelerator.get_state_dict(self.model)
        return {name: state[name].detach().cpu().clone() for name in self.names} if state else {}

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


def _add(sums: dict[str, list[float]], name: str, column: Tensor) -> None:
    measured = column[~column.isnan()]
    sums[name][0] += float(measured.sum())
    sums[name][1] += len(measured)


def _part(name: str) -> str:
    """`adapter.blocks.4.can.linear_1.weight` -> `adapter.blocks.can`."""
    return ".".join(word for word in name.split(".")[:4] if not word.isdigit() and word not in ("weight", "bias"))


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(value, device) for value in batch)
    return batch

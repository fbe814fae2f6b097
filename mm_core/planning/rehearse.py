"""A rehearsal: the real sizes of a run with random weights and made-up features, for a few steps of each stage."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from ..data.features import FORMAT, INDEX, SETTINGS, shard_name
from ..data.index import Shard, build_index
from ..data.manifest import Sample
from ..data.precompute import write_shard
from ..errors import SettingError
from ..files import write_json
from ..pipelines.named import configs_of
from ..pipelines.parts import build_scheduler
from ..pipelines.presets import SCHEDULER, ClipLimits, latent_shape
from ..training.adapter_task import ADAPTER_FILE, AdapterTask
from ..training.config import TrainingConfig
from ..training.loop import train
from ..training.runs import METRICS
from .plan import PEAK_TFLOPS, StagePlan
from .plan import plan as make_plan
from .step import id_encoder_sizes

_SAMPLES, _PHOTOS = 4, 2  # of each person
_PEAK_MEMORY = "speed/peak_memory_gib"


class RandomBase:
    """The base that a config names, by its sizes; what `AdapterTask` asks of a `BaseModel`."""

    def __init__(self, config: TrainingConfig) -> None:
        self.name, self.transformer_config, self.vae_config, self.text = configs_of(config.base)
        self.limits = ClipLimits.from_config(self.transformer_config, self.vae_config)

    def load(self, dtype: torch.dtype, *, text_encoder: bool = False) -> CogVideoXPipeline:
        torch.manual_seed(0)  # the same in all processes
        return CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLCogVideoX.from_config(dict(self.vae_config)).to(dtype),
            transformer=CogVideoXTransformer3DModel.from_config(dict(self.transformer_config)).to(dtype),
            scheduler=build_scheduler(SCHEDULER, "CogVideoXDDIMScheduler"),
        )


class RehearsedTask(AdapterTask):
    """A stage on a base of random weights."""

    def __init__(self, config: TrainingConfig, stage: str, start: Path | None = None) -> None:
        super().__init__(config, stage, start)
        self.resting: list[int] = []
        """Bytes on the device before each part of a batch."""

    def open_base(self) -> RandomBase:
        return RandomBase(self.config)

    def batch(self, samples: range) -> dict[str, Any]:
        device = PartialState().device
        if device.type != "cpu":
            self.resting.append(torch.get_device_module(device).memory_allocated(device))
        return super().batch(samples)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one stage."""

    seconds: float
    """A step, the median of those after the resume but the first."""
    gib: Mapping[str, float]
    """By part, at the peak of the device; empty where it keeps no count, as a CPU."""
    validation: tuple[str, ...]


def rehearse(config: TrainingConfig, steps: int, folder: Path, price: float | None = None) -> str:
    """Each stage with the identity loss from step 0: so many steps, one validation, one save, one resume from half of
    them. A table beside the planner's numbers. folder: an empty one, of as many bytes as a few checkpoints. price: of
    an hour of one device, 0 or more; the same for each that the planner knows.

    Raises SettingError for a price below 0.
    """
    if price is not None and not price >= 0:
        raise SettingError(f"The price of an hour is {price}; it must be 0 or more.")
    lines, start, planned = [], None, make_plan(config)
    for name in ("image", "video"):
        stage = config.stage(name)
        loop = replace(
            stage.loop, steps=steps, warmup_steps=0, save_every=-(-steps // 2), keep=9, log_every=1,
            validate_every=steps, workers=0,
        )
        features = folder / "features" / name
        stage = replace(stage, loop=loop, identity_start=0, features=str(features))
        rehearsed = replace(config, **{name: stage}, output=str(folder))
        if PartialState().is_main_process:
            write_features(rehearsed, name, features)
        PartialState().wait_for_everyone()
        last = train(RehearsedTask(rehearsed, name, start), loop, folder / name)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(last)
        PartialState().wait_for_everyone()
        _forget()
        task = RehearsedTask(rehearsed, name, start)
        start = train(task, loop, folder / name) / ADAPTER_FILE
        measured = _measured(folder / name / METRICS, loop.batch_size, task.resting)
        lines += _table(name, measured, planned.stages[name], config.gradient_checkpointing, price)
        del task  # the next stage's memory is its own
    return "\n".join(lines)


def write_features(config: TrainingConfig, stage: str, folder: Path) -> None:
    """What `precompute` would write, at the sizes of the config, of invented people whose face is in the middle."""
    settings, base, encoder = config.stage(stage), RandomBase(config), id_encoder_sizes(config)
    people, frames = config.validation_people + 2, settings.frames
    _, *latents = latent_shape(base.vae_config, frames=frames, height=config.height, width=config.width)
    count, photos, transformer = _SAMPLES * people, _PHOTOS * people, base.transformer_config
    text = (transformer.get("max_text_seq_length", 226), transformer["text_embed_dim"])
    tokens = (encoder.clip_image_size // encoder.clip_patch_size) ** 2 + 1
    size = torch.tensor([config.width, config.height], dtype=torch.float32)
    face = torch.tensor([[0.42, 0.4], [0.58, 0.4], [0.5, 0.5], [0.44, 0.6], [0.56, 0.6]]) * size
    box = torch.cat([0.35 * size, 0.65 * size])
    tensors = {
        "prompts": {
            "prompt_embeds": _random(count + 1, *text),
            "slots": torch.arange(encoder.num_id_tokens).repeat(count + 1, 1),
        },
        "references": {
            "id_tokens": _random(photos, encoder.num_id_tokens, encoder.id_token_dim),
            "structure_tokens": _random(photos, tokens, encoder.clip_hidden_size),
            "embedding": _random(photos, 512).float(),
        },
        "samples": {
            "latents": _random(count, latents[0], transformer["in_channels"], *latents[1:]),
            "boxes": box.repeat(count, frames, 1),
            "landmarks": face.repeat(count, frames, 1, 1),
            "seen": torch.ones(count, latents[0], dtype=torch.bool),
        },
    }
    rows = {
        "prompts": ["", *map(str, range(count))],
        "references": [f"{number}.png" for number in range(photos)],
        "samples": [str(number) for number in range(count)],
    }
    folder.mkdir(parents=True)
    for kind, content in tensors.items():
        write_shard(folder / shard_name(kind, 0), content, {"rows": rows[kind], "skipped": {}})
    write_json(folder / SETTINGS, {"format": FORMAT})
    samples = [
        Sample(
            id=str(number), media=f"{number}.png", caption=str(number), person=str(number % people),
            references=tuple(rows["references"][_PHOTOS * (number % people) :][:_PHOTOS]),
        )
        for number in range(count)
    ]  # fmt: skip
    shards = [Shard(kind=kind, number=0, items=rows[kind]) for kind in tensors]
    write_json(folder / INDEX, build_index(folder, samples, shards))


def _forget() -> None:
    """Free what earlier runs left on the device, and let its peak begin anew."""
    gc.collect()
    device = PartialState().device
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
        torch.get_device_module(device).reset_peak_memory_stats(device)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def _measured(path: Path, batch_size: int, resting: Sequence[int]) -> Measured:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = [line["speed/samples_a_second"] for line in lines if "speed/samples_a_second" in line]
    resumed = speeds[len(speeds) // 2 + 1 :] or speeds[-1:]
    gib, peaks = {}, [line[_PEAK_MEMORY] for line in lines if _PEAK_MEMORY in line]
    if peaks and resting:
        # The judges come with the first step; between the parts of a batch there are gradients too.
        first, last = resting[0] / 2**30, min(resting[1:] or resting) / 2**30
        gib = {"weights, Adam and EMA": first, "judges": last - first, "a step": max(peaks) - last}
    return Measured(
        seconds=statistics.median(batch_size / speed for speed in resumed),
        gib=gib,
        validation=tuple(name for line in lines for name in line if name.startswith("validation/")),
    )


def _table(
    name: str, measured: Measured, planned: StagePlan, checkpointing: bool, price: float | None
) -> list[str]:
    processes, device = PartialState().num_processes, PartialState().device
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    hours = measured.seconds * planned.steps * processes / 3600
    memory = next(row for row in planned.memory if row.checkpointing == checkpointing)
    lines = [
        f"Stage {name}, on {processes} x {gpu or device.type}",
        f"  seconds a step        {measured.seconds:.3f}",
        f"  device hours          {hours:,.1f} for {planned.steps:,} steps; planned "
        + ", ".join(f"{card} {planned_hours:,.1f}" for card, planned_hours in planned.gpu_hours.items()),
        *_money(hours, planned, price),
        f"  validated             {', '.join(sorted(measured.validation)) or 'nothing'}",
    ]
    peak = next((tflops for card, tflops in PEAK_TFLOPS.items() if card in gpu), None)
    if peak is not None:
        used = planned.step_flops / (measured.seconds * processes * peak * 1e12)
        lines.append(f"  MFU                   {used:.1%}, if every sample were judged that may be")
    planned_gib = {part: size / 2**30 for part, size in memory.parts.items() if size}
    found = _parts(measured.gib) if measured.gib else "not counted here"
    return [*lines, f"  peak memory, GiB      {found}; planned {_parts(planned_gib)}"]


def _parts(gib: Mapping[str, float]) -> str:
    return f"{sum(gib.values()):.3g}: " + ", ".join(f"{part} {size:.3g}" for part, size in gib.items())


def _money(hours: float, planned: StagePlan, price: float | None) -> list[str]:
    """What they cost, at the same price an hour."""
    if price is None:
        return []
    cards = ", ".join(f"{card} {card_hours * price:,.0f}" for card, card_hours in planned.gpu_hours.items())
    return [f"  cost                  {hours * price:,.0f} at {price:g} an hour; planned {cards}"]

"""What a training run needs, before any of it is bought: parameters, arithmetic, memory, hours (docs/planner.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..counting import GPUS
from ..training.config import StageConfig, TrainingConfig
from .step import Counted, DryStep, Models, build_models

MFU = 0.4
"""Assumed part of a GPU's peak that training reaches."""
PEAK_TFLOPS = {name: GPUS[name].tflops for name in ("A100", "H100", "RTX 4090")}
CARDS_GIB = (24, 40, 80)
RESERVED = 0.1
"""Assumed part of a card that the CUDA context, kernels' workspaces and fragmentation take."""
# Bytes of a trained parameter, as accelerate keeps it: float32 weight and gradient, Adam's two moments, the average.
WEIGHT, GRADIENT, ADAM, EMA = 4, 4, 8, 4
# bitsandbytes' 8-bit Adam: a byte for each moment and a float32 for each block of them; small tensors stay as they are.
ADAM_8BIT, BLOCK_8BIT, LEAST_8BIT = 2, 256, 4096
_GPUS = (1, 8)
_PARTS = {
    "face perceiver": ("face_perceiver",),
    "projections": ("face_proj", "id_proj"),
    "fusion": ("id_fusion",),
    "face modulation": ("face_modulation", "face_norm1", "face_norm2"),
    "CAN": ("can",),
    "cross-attention": ("attn",),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The peak of each of several GPUs, in bytes: every one holds all of the weights."""

    gpus: int
    micro_batch: int
    checkpointing: bool
    parts: Mapping[str, int]
    total: int
    fits: Mapping[str, bool]
    """By card."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: `image` or `video`."""

    frames: int
    video_tokens: int
    steps: int
    batch_size: int
    micro_batch: int | None
    """None: the batch divided by the number of GPUs."""
    forward_flops: int
    """Of one sample, like the next three; every sample counts as one that carries the identity."""
    backward_flops: int
    recomputed_flops: int
    """The forward pass again, under gradient checkpointing."""
    identity_flops: int
    """Decoding one latent frame and back, where the identity loss acts; 0: it is off."""
    identity_share: float
    """Part of the samples where it acts."""
    step_flops: float
    """Of a whole batch."""
    gpu_hours: Mapping[str, float]
    memory: tuple[Memory, ...]
    checkpoint_bytes: int
    disk_bytes: int
    """Of all checkpoints, while one more than stay is being written."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` counted; prints as tables."""

    base: str
    width: int
    height: int
    trainable: Mapping[str, int]
    frozen: Mapping[str, int]
    stages: Mapping[str, StagePlan]

    def __str__(self) -> str:
        lines = [f"{self.base}, {self.width} x {self.height}", "", "Parameters, millions"]
        for kind, parts in (("trained", self.trainable), ("frozen", self.frozen)):
            lines += [f"  {name:<18}{count / 1e6:>10,.1f}  {kind}" for name, count in parts.items()]
            lines.append(f"  {'all ' + kind:<18}{sum(parts.values()) / 1e6:>10,.1f}")
        for name, stage in self.stages.items():
            lines += ["", *_stage_text(name, stage)]
        return "\n".join(lines)


def plan(config: TrainingConfig) -> Plan:
    """Count on `meta`; takes seconds, whatever the size.

    Raises SettingError for a config whose sizes do not fit the base, CheckpointError for a folder that is no base.
    """
    models = build_models(config, config.video.loop.dtype)
    adapter = [(name.split("."), parameter.numel()) for name, parameter in models.adapter.named_parameters()]
    return Plan(
        base=models.name,
        width=config.width,
        height=config.height,
        trainable={
            part: sum(count for name, count in adapter if not {*name[:1], *name[2:3]}.isdisjoint(prefixes))
            for part, prefixes in _PARTS.items()
        },
        frozen={
            "DiT": _count(models.transformer),
            "VAE": _count(models.vae),
            "T5": _count(models.text_encoder),
            "ViT": _count(models.id_encoder.vision_model),
            "ID perceiver": _count(models.id_encoder.qformer_perceiver),
        },
        stages={name: _stage(config, name) for name in ("image", "video")},
    )


def _stage(config: TrainingConfig, name: str) -> StagePlan:
    stage = config.stage(name)
    loop = stage.loop
    models = build_models(config, loop.dtype)
    step = DryStep(models, config, stage)
    gpus = _GPUS if loop.micro_batch is None else _GPUS[:1]
    cases = [(number, loop.micro_batch or -(-loop.batch_size // number), again) for number in gpus for again in (0, 1)]
    counted = {case: step.count(case[1], bool(case[2])) for case in cases}
    (_, micro, _), plain = next(iter(counted.items()))
    work = counted[(1, micro, int(config.gradient_checkpointing))]
    forward, backward, decoding, sampled = (
        flops // micro for flops in (plain.forward, plain.backward, work.identity, work.sampled)
    )
    recomputed = work.backward // micro - backward
    low, high = stage.identity_timesteps
    acting = max(0, loop.steps - stage.identity_start) / loop.steps if stage.identity_weight else 0.0
    share = (high - low) / 1000 * acting
    memory = tuple(
        _memory(models, stage, case, gpus, micro, bool(again)) for (gpus, micro, again), case in counted.items()
    )
    checkpoint = sum(memory[0].parts[part] for part in ("trained weights", "Adam", "EMA"))
    flops = loop.batch_size * (forward + backward + recomputed + acting * sampled + share * decoding)
    return StagePlan(
        frames=stage.frames,
        video_tokens=step.video_tokens,
        steps=loop.steps,
        batch_size=loop.batch_size,
        micro_batch=loop.micro_batch,
        forward_flops=forward,
        backward_flops=backward,
        recomputed_flops=recomputed,
        identity_flops=decoding,
        identity_share=share,
        step_flops=flops,
        gpu_hours={gpu: flops * loop.steps / (peak * 1e12 * MFU * 3600) for gpu, peak in PEAK_TFLOPS.items()},
        memory=memory,
        checkpoint_bytes=checkpoint,
        disk_bytes=(loop.keep + 1) * checkpoint,
    )


def _memory(
    models: Models, stage: StageConfig, counted: Counted, gpus: int, micro: int, checkpointing: bool
) -> Memory:
    trained = _count(models.adapter)
    parts = {
        "frozen weights": _bytes(models.transformer) + (_bytes(models.vae) if stage.identity_weight else 0),
        "trained weights": WEIGHT * trained,
        "gradients": GRADIENT * trained,
        "Adam": sum(_adam_bytes(p.numel(), stage.loop.use_8bit_adam) for p in models.adapter.parameters()),
        "EMA": EMA * trained if stage.loop.ema_decay else 0,
        "forward pass": counted.kept,
        "identity loss": counted.decoding,
        "backward pass": max(0, counted.peak - counted.kept - counted.decoding),
    }
    # torch's Adam makes as many temporaries as there are weights, when the backward pass has freed its own.
    parts["update"] = 0 if stage.loop.use_8bit_adam else max(0, WEIGHT * trained - counted.peak)
    total = sum(parts.values())
    return Memory(
        gpus=gpus,
        micro_batch=micro,
        checkpointing=checkpointing,
        parts=parts,
        total=total,
        fits={f"{card} GB": total <= card * 2**30 * (1 - RESERVED) for card in CARDS_GIB},
    )


def _adam_bytes(size: int, small: bool) -> int:
    """Of the moments of a tensor with so many elements."""
    if not small or size < LEAST_8BIT:
        return ADAM * size
    return ADAM_8BIT * size + 8 * -(-size // BLOCK_8BIT)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stage_text(name: str, stage: StagePlan) -> list[str]:
    lines = [
        f"Stage {name}: {stage.frames} frame(s), {stage.video_tokens:,} video tokens, {stage.steps:,} steps of "
        f"{stage.batch_size}",
        f"  TFLOP a sample: forward {stage.forward_flops / 1e12:.2f}, backward {stage.backward_flops / 1e12:.2f}, "
        f"checkpointing {stage.recomputed_flops / 1e12:.2f}; identity loss {stage.identity_flops / 1e12:.2f} in "
        f"{stage.identity_share:.0%} of samples",
        f"  PFLOP a step: {stage.step_flops / 1e15:.2f}",
        f"  GPU hours at {MFU:.0%} of the vendors' peak (an assumption): "
        + ", ".join(f"{gpu} ({PEAK_TFLOPS[gpu]} TFLOPS) {hours:,.0f}" for gpu, hours in stage.gpu_hours.items()),
        f"  GB on the disk: {stage.checkpoint_bytes / 1e9:.1f} a checkpoint; those that stay and the next one "
        f"{stage.disk_bytes / 1e9:.1f}",
        f"  GiB on each GPU; it fits where {RESERVED:.0%} of the card stay free (an assumption)",
    ]
    first = stage.memory[0]
    columns = [("GPUs", "micro-batch", "checkpointing", *first.parts, "total", *first.fits)]
    for memory in stage.memory:
        numbers = [f"{size / 2**30:.1f}" for size in (*memory.parts.values(), memory.total)]
        fits = ["fits" if fit else "no" for fit in memory.fits.values()]
        gpus = f"{memory.gpus}" if stage.micro_batch is None else "any"
        settings = [gpus, str(memory.micro_batch), "on" if memory.checkpointing else "off"]
        columns.append((*settings, *numbers, *fits))
    return lines + [f"    {title:<18}" + "".join(f"{cell:>9}" for cell in cells) for title, *cells in zip(*columns)]

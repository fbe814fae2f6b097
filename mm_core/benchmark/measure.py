"""What a step and a clip cost: counted at full size, and timed on the machine at hand, plain and adapted in turns.

What else a machine does touches turns alike: of times that the CPU of a shared machine gives, read the ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn

from ..counting import GPUS, Counter, counted
from ..hosts.cogvideox_diffusers import STATE, Attached, attach
from ..memory import device_memory, sampling_parts, size_in_bytes, store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from ..models.block import FaceState
from ..models.config import AdapterConfig
from ..models.id_encoder import FaceFeatures
from ..models.modulation import BlockFactors
from ..pipelines.clip import ClipSettings
from ..pipelines.decode import decode
from ..pipelines.identity import Identity
from ..pipelines.magic_mirror import MagicMirror
from ..pipelines.plan import PHASES
from ..pipelines.presets import PRESETS, Preset, latent_shape

FRAMES, HEIGHT, WIDTH, STEPS = 49, 480, 720, 50
"""The clip of the paper's Tab. 6, with guidance."""
CASES = ("plain", "adapted")
_GPUS = ("A800", "H100", "H200", "RTX 4090")
_PHOTO_TOKENS = 257

Timed = dict[str, dict[str, list[float]]]
"""By case, then `seconds` of each round and, where torch tells it, `peaks` in bytes."""


@dataclass(kw_only=True)
class Comparison:
    """One step of the base and of the same with an adapter, at full size."""

    base: Counter
    adapted: Counter
    weights: int
    """Bytes of the adapter on the device in the loop: weights, and what it knows of the step."""

    @property
    def extra(self) -> int:
        """Bytes at the loop's peak beyond the base's."""
        return self.weights + self.adapted.peak - self.base.peak

    def numbers(self) -> dict[str, dict[str, float]]:
        """By case, what the page tells."""
        return {
            case: {"flops": cost.flops, "bytes": cost.bytes, "activations": cost.peak}
            | {f"seconds on {name}": cost.seconds(GPUS[name]) for name in _GPUS}
            for case, cost in zip(CASES, (self.base, self.adapted), strict=True)
        } | {"extra": {"bytes": self.extra}}


def compare(preset: str, *, fp8: bool = False) -> Comparison:
    """Count a step in bf16 on `meta`. fp8: the large layers of base and adapter are stored as 8-bit floats."""
    costs, weights = [], 0
    for with_adapter in (False, True):
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel(**PRESETS[preset].transformer).bfloat16().eval()
            adapter = MagicMirrorAdapter(AdapterConfig.for_base(transformer.config)).bfloat16().eval()
        attached = attach(transformer, adapter) if with_adapter else None
        if fp8:
            store_in_fp8(transformer, adapter if with_adapter else None, torch.bfloat16)
        state = None if attached is None else _known_state(attached)
        inputs = _step_inputs(transformer, FRAMES, HEIGHT, WIDTH)
        with counted() as cost:
            for _ in range(2):
                cost.restart()
                transformer(**inputs, attention_kwargs=None if state is None else {STATE: state})
        costs.append(cost)
        if state is not None:
            weights = _loop_bytes(adapter, state)
    return Comparison(base=costs[0], adapted=costs[1], weights=weights)


def steps_in_turns(
    sizes: Mapping[str, Any],
    *,
    frames: int,
    height: int,
    width: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Timed:
    """Time a step with guidance of a transformer with random weights, plain and adapted.

    sizes: of `CogVideoXTransformer3DModel`. The peak of the plain steps is without the adapter's weights.
    """
    with torch.device("meta"):  # so that nothing is on the device in float32, nor what no step runs
        transformer = nn.Module.to(CogVideoXTransformer3DModel(**sizes), dtype).eval()
        adapter = MagicMirrorAdapter(AdapterConfig.for_base(transformer.config)).to(dtype)
    attached = attach(transformer, adapter)
    for module in (transformer, *sampling_parts(adapter)):
        for parameter in module.to_empty(device=device).parameters():
            nn.init.normal_(parameter, std=0.02)
    inputs, state = _step_inputs(transformer, frames, height, width), _known_state(attached)

    def step(kwargs: dict[str, FaceState] | None) -> None:
        transformer(**inputs, attention_kwargs=kwargs)

    timed = _take_turns({"plain": lambda: step(None), "adapted": lambda: step({STATE: state})}, rounds, device)
    timed["plain"]["peaks"] = [peak - _loop_bytes(adapter, state) for peak in timed["plain"]["peaks"]]
    return timed


def full_size(preset: Preset, *, rounds: int, device: torch.device) -> dict[str, Any]:
    """Steps and decoding of a published model with random weights, in bf16; seconds and bytes, medians of the rounds.
    """
    sizes = dict(frames=FRAMES, height=HEIGHT, width=WIDTH)
    steps = steps_in_turns(preset.transformer, **sizes, rounds=rounds, device=device, dtype=torch.bfloat16)
    with device:
        vae = nn.Module.to(AutoencoderKLCogVideoX.from_config(dict(preset.vae)), torch.bfloat16).eval()
    latents = torch.randn(1, *latent_shape(vae.config, **sizes))
    memory = device_memory(device)
    decoding = _take_turns(
        {"decoding": lambda: decode(vae, latents, device, None if memory is None else memory[0])}, 1, device
    )["decoding"]
    found: dict[str, Any] = {"decoding": {name: median(values) for name, values in decoding.items() if values}}
    for case, values in steps.items():
        step = median(values["seconds"])
        found[case] = {"step": step, "clip": STEPS * step + found["decoding"]["seconds"]}
        found[case] |= {"peak": max(values["peaks"])} if values["peaks"] else {}
    return found


def phases(mirror: MagicMirror, clip: ClipSettings, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each phase of a clip of two steps or more, medians of the rounds, by case.

    Somebody random stands for the person; without an adapter there is the plain case only.
    """
    people = {"plain": None} | ({} if mirror.header is None else {"adapted": _somebody(mirror.header.config)})
    found: dict[str, dict[str, list[float]]] = {case: {name: [] for name in PHASES} for case in people}
    for turn in range(rounds + 1):
        for case, person in people.items():
            # A prompt that was encoded before takes no time.
            took = _phases_of(mirror, replace(clip, prompt=f"{clip.prompt} {turn} {case}"), person)
            for name, seconds in took.items() if turn else ():
                found[case][name].append(seconds)
    return {case: {name: median(values) for name, values in took.items()} for case, took in found.items()}


def _phases_of(mirror: MagicMirror, clip: ClipSettings, person: Identity | None) -> dict[str, float]:
    device = mirror.residence.device("transformer")
    stamps = [_now(device)]
    mirror.encode_text(clip.prompt)
    stamps.append(_now(device))
    latents = mirror.sample(clip, person, on_step=lambda *_: stamps.append(_now(device)))
    done = _now(device)
    mirror.decode(latents)
    start, encoded, first, *_, last = stamps
    steps = (last - first) * clip.steps / (clip.steps - 1)
    return {
        "text": encoded - start,
        "identity": done - encoded - steps,
        "steps": steps,
        "decoding": _now(device) - done,
    }


def _somebody(config: AdapterConfig) -> Identity:
    tokens = torch.randn(1, config.num_id_tokens, config.id_token_dim)
    structure = torch.randn(1, _PHOTO_TOKENS, config.clip_hidden_size)
    return Identity(features=FaceFeatures(id_tokens=tokens, structure_tokens=structure), references=())


def _known_state(attached: Attached) -> FaceState:
    """What a step of sampling gets: all factors computed before, identity in one row."""
    config, transformer = attached.adapter.config, attached.transformer
    blocks, dim = len(config.adapted_layers), config.hidden_size
    like = torch.zeros((), dtype=transformer.dtype, device=transformer.proj_out.weight.device)  # stored in fp8 or not
    factors = BlockFactors(face=like.new_zeros(blocks, 1, 6, dim), can=like.new_zeros(blocks, 1, 12, dim))
    tokens = like.new_zeros(1, config.num_face_tokens, dim)
    return attached.ready(FaceState.entering(tokens, factors, like.new_ones(())))


def _loop_bytes(adapter: MagicMirrorAdapter, state: FaceState) -> int:
    return sum(map(size_in_bytes, sampling_parts(adapter))) + sum(x.nbytes for x in (*state.factors, state.streams))


def _step_inputs(
    transformer: CogVideoXTransformer3DModel, frames: int, height: int, width: int, batch: int = 2
) -> dict[str, Any]:
    """Arguments of a forward pass, of the transformer's device and type."""
    config, like = transformer.config, transformer.proj_out.weight
    frames = (frames - 1) // 4 + 1
    latents = torch.zeros(
        batch, frames, config.in_channels, height // 8, width // 8, dtype=transformer.dtype, device=like.device
    )
    tokens = frames * (height // 16) * (width // 16)
    angles = torch.zeros(2, tokens, config.attention_head_dim, device=like.device)
    return dict(
        hidden_states=latents if like.is_meta else latents.normal_(),
        encoder_hidden_states=latents.new_zeros(batch, config.max_text_seq_length, config.text_embed_dim),
        timestep=torch.full((batch,), 500, device=like.device),
        image_rotary_emb=(angles[0].cos(), angles[1].sin()) if config.use_rotary_positional_embeddings else None,
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _take_turns(cases: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> Timed:
    """After one round to warm up."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    timed: Timed = {name: {"seconds": [], "peaks": []} for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            if module is not None:
                module.reset_peak_memory_stats(device)
            start = _now(device)
            run()
            seconds = _now(device) - start
            if turn:
                timed[name]["seconds"].append(seconds)
                timed[name]["peaks"] += [] if module is None else [module.max_memory_allocated(device)]
    return timed

"""What the adapter costs a denoising step of CogVideoX-5B, beside the base model's own.

Counted at full size, 49 frames of 480 x 720 with guidance, op by op and without memory: arithmetic, bytes moved, the
time that these two allow on some GPUs, and memory. Then measured here in blocks of full width: the base, the adapter
with factors known, and the adapter that computes them each step take turns in one run, so that what else the machine
does touches them alike: read the ratios. On a GPU: `--device cuda --dtype bfloat16 --frames 49 --height 480`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import CogVideoXTransformer3DModel

from mm_core.counting import GIB, GPUS, Counter, counted
from mm_core.hosts.cogvideox_diffusers import STATE, Attached, attach
from mm_core.memory import sampling_parts, size_in_bytes, store_in_fp8
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.block import FaceState
from mm_core.models.config import AdapterConfig
from mm_core.models.modulation import BlockFactors
from mm_core.pipelines.presets import PRESETS

PRESET = "CogVideoX-5b"
FRAMES, HEIGHT, WIDTH, STEPS = 49, 480, 720, 50


@dataclass(kw_only=True)
class Comparison:
    """One step of the base and of the same with an adapter, at full size."""

    base: Counter
    adapted: Counter
    weights: int
    """Bytes of the adapter's weights on the device in the loop."""

    @property
    def extra(self) -> int:
        """Bytes at the loop's peak beyond the base's."""
        return self.weights + self.adapted.peak - self.base.peak


def main() -> None:
    args = _arguments()
    print(f"Counted: one step of {PRESET}, {FRAMES} frames of {HEIGHT} x {WIDTH} with guidance, bf16")
    for storage, fp8 in (("bf16", False), ("fp8", True)):
        _report(compare(fp8=fp8), storage)
    _measure(args)


def compare(*, fp8: bool = False, preset: str = PRESET) -> Comparison:
    """Count a step with guidance. fp8: the large layers of base and adapter are stored as 8-bit floats."""
    costs, weights = [], 0
    for with_adapter in (False, True):
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel(**PRESETS[preset].transformer).bfloat16().eval()
            adapter = MagicMirrorAdapter(AdapterConfig.for_base(transformer.config)).bfloat16().eval()
        attached = attach(transformer, adapter) if with_adapter else None
        if fp8:
            store_in_fp8(transformer, adapter if with_adapter else None, torch.bfloat16)
        state = None if attached is None else _known_state(attached)
        costs.append(_count_step(transformer, state))
        if state is not None:
            held = [*state.factors, state.streams]
            weights = sum(map(size_in_bytes, sampling_parts(adapter))) + sum(x.nbytes for x in held)
    return Comparison(base=costs[0], adapted=costs[1], weights=weights)


def _known_state(attached: Attached) -> FaceState:
    """What a step of sampling gets: all factors computed before, identity in one row."""
    config = attached.adapter.config
    blocks, dim, like = len(config.adapted_layers), config.hidden_size, attached.adapter.id_proj.weight
    factors = BlockFactors(face=like.new_zeros(blocks, 1, 6, dim), can=like.new_zeros(blocks, 1, 12, dim))
    tokens = like.new_zeros(1, config.num_face_tokens, dim)
    return attached.ready(FaceState.entering(tokens, factors, like.new_ones(())))


def _count_step(transformer: CogVideoXTransformer3DModel, state: FaceState | None) -> Counter:
    inputs = _step_inputs(transformer, FRAMES, HEIGHT, WIDTH, batch=2)
    with counted() as cost:
        for _ in range(2):
            cost.restart()
            transformer(**inputs, attention_kwargs=None if state is None else {STATE: state})
    return cost


def _step_inputs(
    transformer: CogVideoXTransformer3DModel, frames: int, height: int, width: int, batch: int
) -> dict[str, Any]:
    """Arguments of a forward pass, of the transformer's device and type."""
    config, like = transformer.config, transformer.proj_out.weight
    frames = (frames - 1) // 4 + 1
    latents = like.new_empty(batch, frames, config.in_channels, height // 8, width // 8, dtype=transformer.dtype)
    tokens = frames * (height // 16) * (width // 16)
    angles = torch.zeros(2, tokens, config.attention_head_dim, device=like.device)
    return dict(
        hidden_states=latents.normal_() if like.device.type != "meta" else latents,
        encoder_hidden_states=torch.zeros(batch, 226, config.text_embed_dim, device=like.device).to(latents),
        timestep=torch.full((batch,), 500, device=like.device),
        image_rotary_emb=(angles[0].cos(), angles[1].sin()) if config.use_rotary_positional_embeddings else None,
    )


def _report(compared: Comparison, storage: str) -> None:
    base, adapted = compared.base, compared.adapted
    print(f"\n{storage} storage            base   adapted   ratio")
    rows = [("TFLOP", base.flops / 1e12, adapted.flops / 1e12), ("GB moved", base.bytes / 1e9, adapted.bytes / 1e9)]
    rows += [(f"s on {name}, roofline", base.seconds(gpu), adapted.seconds(gpu)) for name, gpu in GPUS.items()]
    rows += [("GiB of activations", base.peak / GIB, adapted.peak / GIB)]
    for name, theirs, ours in rows:
        print(f"{name:22s} {theirs:9.2f} {ours:9.2f}   {ours / theirs:.4f}")
    print(f"GiB at the loop's peak beyond the base's: {compared.extra / GIB:.2f}")


def _measure(args: argparse.Namespace) -> None:
    """Wall-clock, one step with guidance of a few blocks."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    transformer = CogVideoXTransformer3DModel(
        **PRESETS[PRESET].transformer | dict(num_attention_heads=args.heads, num_layers=args.layers)
    )
    adapter = MagicMirrorAdapter(AdapterConfig.for_base(transformer.config))
    for module in (transformer, adapter):
        torch.nn.Module.to(module, device, dtype).eval()
    attached = attach(transformer, adapter)
    inputs = _step_inputs(transformer, args.frames, args.height, args.height * 3 // 2, batch=2)
    ids = torch.randn(1, 2, 2048, device=device, dtype=dtype)
    faces = torch.randn(1, 32, adapter.config.hidden_size, device=device, dtype=dtype)

    def compute_state() -> FaceState:
        return attached.face_state(id_tokens=ids, face_tokens=faces, timestep=inputs["timestep"][1:])

    known = compute_state()

    def step(state: FaceState | None) -> None:
        transformer(**inputs, attention_kwargs={STATE: state} if state else None)

    cases = {
        "base": lambda: step(None),
        "adapter, factors known": lambda: step(known),
        "adapter, factors each step": lambda: step(compute_state()),
    }
    times = _take_turns(cases, args.rounds, device)
    tokens, width = len(inputs["image_rotary_emb"][0]), adapter.config.hidden_size
    print(f"\nMeasured: {tokens} video tokens, width {width}, {args.layers} blocks, {args.dtype}, {args.device}")
    for name, seconds in times.items():
        ratios = sorted(ours / base for ours, base in zip(seconds, times["base"], strict=True))
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}" if name != "base" else ""
        print(f"{name:28s} {statistics.median(seconds):8.3f} s   {statistics.median(ratios):.3f} x base   {spread}")


@torch.no_grad()
def _take_turns(cases: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each case in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=48, help="of 64; the 5B model has 48")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=160, help="pixels; the width is 1.5 times that")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()

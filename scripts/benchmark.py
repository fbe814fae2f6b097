"""What the adapter costs a step: the base, the adapter with factors known, the adapter that computes them each step.

The three take turns in one run, so that what else the machine does touches them alike: read the ratios.
`python scripts/benchmark.py --device cuda --dtype bfloat16 --width 48 --layers 4` runs blocks of the 5B model's size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import CogVideoXTransformer3DModel

from mm_core.hosts.cogvideox_diffusers import STATE, attach
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.block import FaceState
from mm_core.models.config import AdapterConfig


def main() -> None:
    args = _arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=args.width, num_layers=args.layers, sample_frames=args.frames
    )
    adapter = MagicMirrorAdapter(AdapterConfig.for_base(transformer.config))
    for module in (transformer, adapter):
        torch.nn.Module.to(module, device, dtype).eval()
    attached = attach(transformer, adapter)
    timestep = torch.tensor([500], device=device)
    text = torch.randn(1, 226, 4096, device=device, dtype=dtype)
    latents = torch.randn(1, (args.frames - 1) // 4 + 1, 16, args.height // 8, args.height // 8 * 3 // 2)
    latents = latents.to(device, dtype)
    ids = torch.randn(1, 2, 2048, device=device, dtype=dtype)
    faces = torch.randn(1, 32, adapter.config.hidden_size, device=device, dtype=dtype)

    def compute_state() -> FaceState:
        return attached.face_state(id_tokens=ids, face_tokens=faces, timestep=timestep)

    known = compute_state()

    def step(state: FaceState | None) -> None:
        transformer(latents, text, timestep, attention_kwargs={STATE: state} if state else None)

    cases = {
        "base": lambda: step(None),
        "adapter, factors known": lambda: step(known),
        "adapter, factors each step": lambda: step(compute_state()),
    }
    medians = _take_turns(cases, args.rounds, device)
    tokens, width = latents.shape[1] * latents.shape[3] * latents.shape[4] // 4, adapter.config.hidden_size
    print(f"{tokens} video tokens, width {width}, {args.layers} blocks, {args.dtype}, {args.device}")
    for name, seconds in medians.items():
        print(f"{name:28s} {seconds / medians['base']:.3f} x base")


@torch.no_grad()
def _take_turns(cases: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each case, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="heads of 64; the 5B model has 48")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=256, help="pixels; the width is 1.5 times that")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What each way of saving work costs on the small model: deviation, likeness and movements of people that it never saw.

Every way makes the clips that `off` makes, of the same people, captions and noise. Prints a Markdown table and writes
everything to --out as JSON; a way whose clips are in --clips is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mm_core.choices import SCHEDULERS, STEP_CACHES, STORED
from mm_core.faces.references import analyse_references
from mm_core.files import write_json
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

from ..people.captions import caption
from ..people.person import Person
from ..people.render import render_clip
from ..people.scene import sample_clip
from .score import GUIDANCE, PROMPT_CLIPS, REFERENCE_CLIP, REFERENCE_FRAME, Scorer

OFF = "off"
WAYS: Mapping[str, Mapping[str, object]] = {
    OFF: {},
    **{f"{steps} steps": dict(steps=steps) for steps in (20, 16, 12)},
    **{f"step_cache {kind}": dict(step_cache=kind) for kind in STEP_CACHES[1:]},
    **{precision: dict(precision=precision) for precision in STORED},
    **{f"{p}, step_cache {k}": dict(precision=p, step_cache=k) for p in STORED for k in STEP_CACHES[1:]},
}
"""Settings of a clip that differ from those of `off`; `precision` is the model's."""


def main() -> None:
    args = _parse()
    torch.set_num_threads(1)
    scorer = Scorer(args.people)
    made = {way: make(scorer, way, args) for way in args.ways}
    for way, (clips, _) in made.items():
        for number, seed in enumerate(scorer.people):
            for place, clip in enumerate(PROMPT_CLIPS):
                frames = (clips[number, place] * 255).round().astype(np.uint8)
                scorer.score(way, number, frames, sample_clip(seed, clip))
    report = scorer.report()
    for way, (clips, calls) in made.items():
        off, all_calls = made[OFF]
        report[way] |= {"calls": calls / all_calls, "psnr": _psnr(clips, off)}
    print(table(report))
    write_json(args.out, {"people": args.people, "rows": report})


def make(scorer: Scorer, way: str, args: argparse.Namespace) -> tuple[np.ndarray, int]:
    """(people, clips, F, H, W, 3) frames in 0..1, and rows that the blocks computed in all."""
    path = args.clips / f"{way}.npz"
    if path.is_file():
        found = np.load(path)
        return found["frames"], int(found["calls"])
    settings = dict(WAYS[way])
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"), precision=settings.pop("precision", "auto"))
    calls, frames = [0], []

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[0] += len(inputs[0])

    for block in mirror.pipeline.transformer.transformer_blocks:
        block.attn1.to_q.register_forward_pre_hook(count)
    limits = mirror.base.limits
    for number, seed in enumerate(tqdm(scorer.people, desc=way, unit="person")):
        reference = render_clip(Person.from_seed(seed), sample_clip(seed, REFERENCE_CLIP))[REFERENCE_FRAME]
        identity = mirror.identity(analyse_references(scorer.analyzer, [reference]))
        for clip in PROMPT_CLIPS:
            wanted = ClipSettings(
                prompt=caption(sample_clip(seed, clip)), width=limits.width, height=limits.height,
                num_frames=limits.num_frames, steps=args.steps, scheduler=args.scheduler, guidance_scale=GUIDANCE,
                dynamic_guidance=False, seed=1000 * number + clip,
            )  # fmt: skip
            frames.append(mirror.generate(replace(wanted, **settings), identity).frames.numpy())
    made = np.stack(frames).reshape(len(scorer.people), len(PROMPT_CLIPS), *frames[0].shape)
    args.clips.mkdir(parents=True, exist_ok=True)
    np.savez(path, frames=made, calls=calls[0])
    return made, calls[0]


def table(report: Mapping[str, Mapping[str, object]]) -> str:
    judges = list(report[OFF]["cosine"])
    lines = [
        f"| | block calls | PSNR | {' | '.join(judges)} | face motion | movements that come |",
        "|---|---|---|" + "---|" * (len(judges) + 2),
    ]
    for way, row in report.items():
        alike = " | ".join(f"{row['cosine'][judge]['mean']:.3f}".removeprefix("0") for judge in judges)
        psnr = "" if way == OFF else f"{row['psnr']:.1f}"
        calls = "1" if way == OFF else f"1 / {1 / row['calls']:.1f}"
        lines.append(f"| {way} | {calls} | {psnr} | {alike} | {row['fm_inter']:.4f} | {row['followed']['all']:.0%} |")
    return "\n".join(lines)


def _psnr(clips: np.ndarray, reference: np.ndarray) -> float:
    """dB, the mean over clips."""
    errors = ((clips - reference) ** 2).mean(axis=(2, 3, 4, 5))
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-12))))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=13)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="dpm", choices=SCHEDULERS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--clips", type=Path, default=Path("savings"), help="folder that keeps the clips")
    parser.add_argument("--out", type=Path, default=Path("savings.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

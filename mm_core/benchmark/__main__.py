"""Count and time what the adapter costs beside the base model's own: a page in Markdown, with JSON and a picture.

Full size is counted without memory; times are those of this machine. Where there is a GPU, `--device cuda` also times
CogVideoX-5b with random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..choices import POLICIES, TINY
from ..errors import exit_code
from ..files import write_json, write_text
from ..memory import default_device
from ..pipelines.base import FolderBase, TinyBase
from ..pipelines.clip import ClipSettings
from ..pipelines.magic_mirror import MagicMirror
from ..pipelines.plan import published_plan, table
from ..pipelines.presets import PRESETS
from .measure import compare, full_size, phases, steps_in_turns
from .page import draw, to_markdown

COUNTED = ("CogVideoX-5b", "CogVideoX-2b")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "mm_core.benchmark", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: _run(args, command))


def _run(args: argparse.Namespace, command: str) -> None:
    write(measure(args) | {"command": command}, args.output)
    print(args.output.absolute())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the page tells, as JSON holds it."""
    device = torch.device(args.device)
    base = TinyBase() if args.base == TINY else FolderBase(Path(args.base))
    mirror = MagicMirror(base, adapter=args.adapter, offload=args.offload, device=device)
    clip = ClipSettings.of_model(base.limits, base.sampling, prompt="A person img smiles.")
    counts = {
        name: {storage: compare(name, fp8=storage == "fp8").numbers() for storage in ("bf16", "fp8")}
        for name in COUNTED
    }
    plans = {name: published_plan(PRESETS[name]) for name in COUNTED}
    sizes = PRESETS[COUNTED[0]].transformer | {"num_layers": 2}
    small, dtype = dict(frames=9, height=96, width=144), torch.float32 if device.type == "cpu" else torch.bfloat16
    timed = steps_in_turns(sizes, **small, rounds=args.rounds, device=device, dtype=dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    full = full_size(PRESETS[COUNTED[0]], rounds=args.rounds, device=device) if device.type == "cuda" else None
    return {
        "machine": f"torch {torch.__version__} and diffusers {diffusers.__version__}",
        "counts": counts,
        "memory": {name: {policy: plan.peaks(policy) for policy in POLICIES} for name, plan in plans.items()},
        "cards": table(),
        "ratios": {
            "layers": sizes["num_layers"],
            "width": sizes["num_attention_heads"] * sizes["attention_head_dim"],
            "tokens": 3 * 6 * 9,
            "dtype": str(dtype).removeprefix("torch."),
            "device": name,
            "timed": timed,
        },
        "phases": {
            "base": base.name,
            "device": name,
            "clip": clip.summary,
            "rounds": args.rounds,
            "seconds": phases(mirror, clip, args.rounds),
        },
        "full_size": None if full is None else full | {"device": name},
    }


def write(found: dict[str, Any], page: Path) -> None:
    """The page, and beside it the numbers as JSON and the picture, the latter where matplotlib is installed."""
    picture = page.with_suffix(".png") if importlib.util.find_spec("matplotlib") else None
    if picture is None:
        print(f'no picture: it needs matplotlib ("{sys.executable}" -m pip install matplotlib)', file=sys.stderr)
    else:
        draw(found, picture)
    write_json(page.with_suffix(".json"), found)
    write_text(page, to_markdown(found, picture and picture.name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mm_core.benchmark", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the page, a .md file; .json and .png come beside it")
    add("--base", default=TINY, help="whose phases are timed: tiny, or a diffusers folder")
    add("--adapter", type=Path, help="adapter file; tiny brings its own, and without one the base alone is timed")
    add("--offload", default="auto", help="of the phases, as in generate")
    add("--device", default=str(default_device()), help="where to time")
    add("--rounds", type=int, default=5, help="after one to warm up")
    return parser


if __name__ == "__main__":
    sys.exit(main())

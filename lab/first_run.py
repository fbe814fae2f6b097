"""From an empty folder to a trained adapter and its scores, in minutes: `python -m lab.first_run --folder runs/first`.

Renders a few people and hands them to `python -m mm_core.training train`, which prints where the page of the scores is,
with the config of `tiny` that comes with it. It shows that everything works here; a few steps teach nothing. The same
command goes on from wherever it was stopped or killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_core.errors import exit_code
from mm_core.release.commands import main as train

from .people.manifest import write_manifest
from .people.shards import RenderSettings, render_dataset

CONFIG = Path(__file__).parents[1] / "mm_core" / "training" / "configs" / "tiny.yaml"
CLIPS = 2  # of each person; each one's photos are of the other


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of `train`, 2 for a folder that holds other people."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of everything that is made")
    parser.add_argument("--insightface-root", type=Path, default=Path("~/.insightface"), help="holds models/buffalo_sc")
    parser.add_argument("--people", type=int, default=8, help="the last one is left out of training")
    parser.add_argument("--steps", type=int, default=4, help="of each stage")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    render(args.folder / "people", args.people)
    return train(["train", "--config", str(CONFIG), "--set", *settings(args.folder, args.insightface_root, args.steps)])


def render(folder: Path, people: int) -> None:
    """The data of both stages, as far as it is missing."""
    render_dataset(folder, RenderSettings(first=0, stop=people, clips=CLIPS), processes=1)
    for name in ("images.jsonl", "manifest.jsonl"):
        if not (folder / name).is_file():
            write_manifest(folder, name, pictures=name == "images.jsonl")


def settings(folder: Path, insightface_root: Path, steps: int) -> list[str]:
    """What is not as in CONFIG: where everything is, and stages that are as short as they can be."""
    own: dict[str, object] = {"insightface_root": insightface_root, "output": folder / "run"}
    for stage, manifest in (("image", "images.jsonl"), ("video", "manifest.jsonl")):
        own |= {f"{stage}.data": folder / "people" / manifest, f"{stage}.features": folder / "features" / stage}
        own |= {f"{stage}.loop.steps": steps, f"{stage}.loop.batch_size": 2, f"{stage}.loop.log_every": 1}
    return [f"{name}={value}" for name, value in own.items()]


if __name__ == "__main__":
    sys.exit(main())

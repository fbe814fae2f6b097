"""From an empty folder to a trained adapter and its scores, in minutes: `python -m lab.first_run --folder runs/first`.

Renders a few people, writes the config of a run on `tiny`, and hands it to `python -m mm_core.training train`, which
prints where the page of the scores is. It shows that everything works here; a few steps teach nothing. The same command
goes on from wherever it was stopped or killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_core.errors import MagicMirrorError
from mm_core.files import write_json
from mm_core.release.commands import main as train

from .people.manifest import write_manifest
from .people.shards import RenderSettings, render_dataset

CLIPS = 2  # of each person; each one's photos are of the other


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of `train`, 2 for a folder that holds other people."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of everything that is made")
    parser.add_argument("--insightface-root", type=Path, default=Path("~/.insightface"), help="holds models/buffalo_sc")
    parser.add_argument("--people", type=int, default=8, help="the last one is left out of training")
    parser.add_argument("--steps", type=int, default=4, help="of each stage")
    args = parser.parse_args(argv)
    try:
        render(args.folder / "people", args.people)
    except MagicMirrorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = args.folder / "config.yaml"
    if not config.is_file():
        write_json(config, settings(args.folder, args.insightface_root, args.steps))  # which is YAML too
    return train(["train", "--config", str(config)])


def render(folder: Path, people: int) -> None:
    """The data of both stages, as far as it is missing."""
    render_dataset(folder, RenderSettings(first=0, stop=people, clips=CLIPS), processes=1)
    for name in ("images.jsonl", "manifest.jsonl"):
        if not (folder / name).is_file():
            write_manifest(folder, name, pictures=name == "images.jsonl")


def settings(folder: Path, insightface_root: Path, steps: int) -> dict[str, object]:
    """Both stages, as short as they can be."""
    loop = {"steps": steps, "batch_size": 2, "log_every": 1}
    stages = {
        name: {
            "data": str(folder / "people" / manifest), "features": str(folder / "features" / name), "frames": frames,
            "loop": loop,
        }
        for name, manifest, frames in (("image", "images.jsonl", 1), ("video", "manifest.jsonl", 9))
    }  # fmt: skip
    return stages | {
        "base": "tiny", "insightface_root": str(insightface_root), "face_pack": "buffalo_sc",
        "output": str(folder / "run"), "width": 64, "height": 64, "validation_people": 1,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""`python -m lab.people`: render people for training and evaluation, list them, or draw a sheet to look at."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mm_core.errors import MagicMirrorError, SettingError, exit_code

from .traits import HELD_OUT


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 2 for a mistake in the arguments, 130 when interrupted."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), "stopped; the same command goes on from there")


def _run(args: argparse.Namespace) -> None:
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        needed = "python -m pip install numba scipy opencv-python"
        raise MagicMirrorError(f"{error}. Rendering people needs: {needed}") from error


def render(args: argparse.Namespace) -> None:
    """Write shards, or the rest of them."""
    from tqdm import tqdm

    from .shards import RenderSettings, render_dataset

    settings = RenderSettings(
        first=args.people.start, stop=args.people.stop, clips=args.clips, frames=args.frames, size=args.size
    )
    if settings.held_out and not args.held_out:
        raise SettingError(f"people from {HELD_OUT} on are held out for evaluation: say --held-out if this is for it")
    with tqdm(total=settings.stop - settings.first, unit="person", smoothing=0.1) as bar:

        def advance(people: int, new: int) -> None:
            if new:
                bar.update(people)
            else:  # what an earlier run finished does not count for the speed
                bar.initial = bar.n = people
                bar.refresh()

        render_dataset(args.out, settings, args.processes, advance)
    print(args.out)


def sheet(args: argparse.Namespace) -> None:
    """Write a contact sheet."""
    import cv2

    from mm_core.files import write_bytes

    from .sheet import contact_sheet

    picture = contact_sheet(args.people, args.clips, args.shown, args.size)
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_bytes(args.out, png.tobytes())
    print(args.out)


def manifest(args: argparse.Namespace) -> None:
    """List the rendered clips, or pictures out of them, as a data set to train on."""
    from .manifest import write_manifest

    if args.frames not in (None, 1):
        raise SettingError(f"{args.frames} frames: give 1 for single pictures, or leave --frames out for whole clips")
    name = args.name or ("manifest.jsonl" if args.frames is None else "images.jsonl")
    if Path(name).name != name or not name.endswith(".jsonl"):
        raise SettingError(f"{name!r} is no file name that ends in .jsonl")
    samples = write_manifest(args.out, name, pictures=args.frames == 1)
    print(f"{args.out / name}: {samples} samples")


def _people(text: str) -> range:
    """Seeds from first:stop, such as 0:3000."""
    try:
        first, stop = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of people: write first:stop, such as 0:3000") from None
    if not 0 <= first < stop:
        raise argparse.ArgumentTypeError(f"{text!r} holds nobody: write first:stop with 0 <= first < stop")
    return range(first, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.people", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run, text in (("render", render, "write a data set"), ("sheet", sheet, "write a contact sheet")):
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        command.add_argument("--people", type=_people, required=True, help=f"first:stop; held out from {HELD_OUT} on")
        command.add_argument("--out", type=Path, required=True, help="folder" if name == "render" else "a .png file")
        command.add_argument("--clips", type=int, default=4 if name == "render" else 2, help="of each person")
        command.add_argument("--size", type=int, default=64 if name == "render" else 128, help="pixels")
        if name == "render":
            command.add_argument("--frames", type=int, default=9, help="8N + 1")
            command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
            command.add_argument("--held-out", action="store_true", help="allow people that are for evaluation")
        else:
            command.add_argument("--shown", type=int, default=2, help="frames of each clip")
    command = commands.add_parser("manifest", help="list a rendered data set for training")
    command.set_defaults(run=manifest)
    command.add_argument("--out", type=Path, required=True, help="the rendered folder; the manifest is written into it")
    command.add_argument("--frames", type=int, help="1: single pictures, two of each clip (default: whole clips)")
    command.add_argument("--name", help="of the file (default: manifest.jsonl for clips, images.jsonl for pictures)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m mm_core.curation`: from raw photos and footage to the trainer's manifest and files.

    pictures   photos with captions (the paper's source A)
    portraits  square portraits, which get black borders and the standard caption (B)
    pairs      a photo and another of the same person, from any generator: 7.jpg and 7.reference.jpg (C)
    video      footage: clips of one person, with references from the person's other clips (D)

    synthesise  what pairs reads: other pictures of the people in portraits, by PhotoMaker-V2 on SDXL
    join        one manifest for the sets in a folder, which a stage then learns together

Interrupted commands go on where they stopped when they are given again. Other thresholds decide anew by what is
measured already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MagicMirrorError, exit_code
from ..faces.packs import INSIGHTFACE

_KINDS = {
    "pictures": "photos with captions",
    "portraits": "square portraits",
    "pairs": "a photo and another of the same person",
    "video": "footage",
}
_PACKAGES = ("pydantic", "yaml", "ray", "pyarrow", "scenedetect", "faiss", "imagehash", "rapidocr")
_INSTALL = 'python -m pip install ".[training,data]"'


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if nothing was kept, 2 for a mistake of the user's, 130 when interrupted."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: args.run(args), "stopped; the same command goes on from there")


def _curate(args: argparse.Namespace) -> int:
    _check_packages()
    from ..progress import bars
    from ..settings_file import load_settings, parse_setting
    from .config import CurationConfig, settings_of_model
    from .run import PAGE, curate

    settings = settings_of_model(args.model) if args.model is not None else {}
    config = load_settings(CurationConfig, args.config, settings | dict(parse_setting(text) for text in args.set))
    with bars() as show:
        tally = curate(
            args.kind, args.inputs, args.out, config, address=args.address, workers=args.workers,
            on_progress=lambda what, done, of: show(f"shards {what}", done, of),
        )  # fmt: skip
    print(tally)
    print(args.out / PAGE)
    return int(not tally.kept)


def _synthesise(args: argparse.Namespace) -> int:
    _check_packages()
    import torch
    from accelerate import PartialState
    from tqdm import tqdm

    from ..evaluation.generate import check_made_with
    from ..faces.analysis import FaceAnalyzer
    from .photomaker import load_photomaker
    from .prompts import read_prompts
    from .synthesise import NOTE, Origin, synthesise

    processes = PartialState(cpu=not torch.accelerator.is_available())  # which alone lets processes on CPUs meet
    analyzer = FaceAnalyzer(args.insightface_root, args.face_pack)
    names = ("sdxl", "photomaker", "prompts", "precision", "steps", "seed")
    made_with = {name: str(vars(args)[name]) for name in names}
    generator = f"PhotoMaker-V2 on {args.sdxl.resolve().name}"
    origin = Origin(prompts=read_prompts(args.prompts), each=args.each, seed=args.seed, generator=generator)
    with processes.main_process_first():
        check_made_with(args.out / NOTE, made_with, "pairs", begun=any(args.out.glob("*.jpg")))
    with tqdm(unit="pair", disable=None if processes.is_main_process else True) as bar:
        made, left_out = synthesise(
            args.inputs,
            args.out,
            lambda: load_photomaker(
                args.sdxl, args.photomaker, analyzer, processes.device,
                precision=args.precision, offload=args.offload, steps=args.steps,
            ),
            origin,
            rank=processes.process_index,
            world_size=processes.num_processes,
            on_picture=lambda there: bar.update(there - bar.n),
        )  # fmt: skip
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    print(f"{args.out}: {made:,} pairs, {len(left_out):,} portraits left out")
    processes.destroy_process_group()
    return int(bool(left_out) and not made)


def _join(args: argparse.Namespace) -> int:
    from .join import join

    for name, samples in join(args.folder).items():
        print(f"{name}: {samples:,} samples")
    return 0


def _check_packages() -> None:
    """Raise MagicMirrorError where one is missing that the pack itself does not need."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MagicMirrorError(f"Training sets need packages that are missing ({', '.join(missing)}): {_INSTALL}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mm_core.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="kind", required=True)
    for kind, what in _KINDS.items():
        command = commands.add_parser(kind, help=what)
        command.set_defaults(run=_curate)
        _shared_arguments(command.add_argument, "for the manifest and what it names")
        command.add_argument("--model", help="that will be trained: tiny, CogVideoX-5b (the default), ...")
        command.add_argument("--config", type=Path, help="a YAML file; docs/data.md has the settings")
        command.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace settings")
        command.add_argument("--workers", type=int, help="processes; default: one for each core")
        command.add_argument("--address", help="of a Ray cluster that shares these paths; default: this machine alone")
    command = commands.add_parser(
        "synthesise", help="make pairs of portraits", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=_synthesise)
    _shared_arguments(command.add_argument, "for the pairs")
    _synthesis_arguments(command.add_argument)
    command = commands.add_parser("join", help="one manifest for several sets")
    command.set_defaults(run=_join)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="in which the sets' folders are")
    return parser


def _shared_arguments(add: Callable[..., Any], what: str) -> None:
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="a folder, .tar or .parquet file")
    add("--out", type=Path, required=True, help=f"folder {what}")


def _synthesis_arguments(add: Callable[..., Any]) -> None:
    add("--sdxl", type=Path, required=True, help="folder of an SDXL in diffusers' layout")
    add("--photomaker", type=Path, required=True, help="photomaker-v2.bin, or its safetensors copy")
    add("--each", type=int, default=2, help="pictures of each person")
    add("--prompts", type=Path, help="text file, a prompt a line, {person} for the person's word; default: our own")
    add("--seed", type=int, default=0, help="of prompts and noise")
    add("--steps", type=int, default=50, help="of a picture")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: fp32 on a CPU, else bf16")
    add("--offload", choices=("none", "model", "sequential"), default="model", help="what waits in main memory")
    add("--insightface-root", type=Path, default=INSIGHTFACE, help="holds models/<pack>/*.onnx")
    add("--face-pack", default="buffalo_l", help="insightface model pack")


if __name__ == "__main__":
    sys.exit(main())

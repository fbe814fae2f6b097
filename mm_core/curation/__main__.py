"""`python -m mm_core.curation`: from raw photos and footage to the trainer's manifest and files.

    pictures   photos with captions (the paper's source A)
    portraits  square portraits, which get black borders and the standard caption (B)
    pairs      a photo and another of the same person, from any generator: 7.jpg and 7.reference.jpg (C)
    video      footage: clips of one person, with references from the person's other clips (D)

Interrupted commands go on where they stopped when they are given again. Other thresholds decide anew by what is
measured already.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import MagicMirrorError, exit_code

_PACKAGES = ("pydantic", "yaml", "ray", "pyarrow", "scenedetect", "faiss", "imagehash", "rapidocr")
_INSTALL = 'python -m pip install ".[training,data]"'


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if nothing was kept, 2 for a mistake of the user's, 130 when interrupted."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _curate(args), "stopped; the same command goes on from there")


def _curate(args: argparse.Namespace) -> int:
    _check_packages()
    from tqdm import tqdm

    from ..settings_file import load_settings, parse_setting
    from .config import CurationConfig, settings_of_model
    from .run import PAGE, curate

    settings = settings_of_model(args.model) if args.model is not None else {}
    config = load_settings(CurationConfig, args.config, settings | dict(parse_setting(text) for text in args.set))
    bars: dict[str, tqdm] = {}

    def show(what: str, done: int, of: int) -> None:
        bar = bars.setdefault(what, tqdm(desc=f"shards {what}", total=of, disable=None))
        bar.update(done - bar.n)

    try:
        tally = curate(
            args.kind, args.inputs, args.out, config, address=args.address, workers=args.workers, on_progress=show
        )
    finally:
        for bar in bars.values():
            bar.close()
    print(tally)
    print(args.out / PAGE)
    return int(not tally.kept)


def _check_packages() -> None:
    """Raise MagicMirrorError where one is missing that the pack itself does not need."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MagicMirrorError(f"Training sets need packages that are missing ({', '.join(missing)}): {_INSTALL}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mm_core.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("pictures", "portraits", "pairs", "video"))
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="a folder, .tar or .parquet file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifest and what it names")
    parser.add_argument("--model", help="what is trained: tiny, a published name, a folder; default: CogVideoX-5b")
    parser.add_argument("--config", type=Path, help="a YAML file; docs/data.md has the settings")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace settings")
    parser.add_argument("--workers", type=int, help="processes; default: one for each core")
    parser.add_argument("--address", help="of a Ray cluster that shares these paths; default: this machine alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())

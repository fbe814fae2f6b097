"""`python -m lab.corpus`: a made corpus with known faults, curated, and each rule's precision and recall.

    pictures     photos of rendered people, 24 of each
    photographs  photos put together from photographs in the public domain, 24 for each person there would be
    video        footage of every tenth of the rendered people, 24 clips

A command that was interrupted goes on when it is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_core.curation.config import CurationConfig, Kind
from mm_core.curation.run import DROPPED, curate
from mm_core.curation.tally import Tally
from mm_core.data.manifest import MANIFEST
from mm_core.errors import exit_code
from mm_core.files import write_json
from mm_core.json_file import read_lines, read_object
from mm_core.settings_file import load_settings

from .footage import FPS, FRAMES, plant_footage
from .photographs import album
from .pictures import KEPT, OR, plant_photographs, plant_pictures

PLANTS = {"pictures": plant_pictures, "photographs": plant_photographs, "video": plant_footage}
FOOTAGE_OF = 10
"""Footage takes long: one of so many people has some."""
TRUTH, TABLE, WANTED = "truth", "table.md", 0.98
# Rendered faces are found with lower scores than photographed ones, mostly behind glasses, and enlarged frames.
_SETTINGS = {
    "pictures": {"keep.min_score": "0.5"},
    "photographs": {},
    "video": {
        **{"keep.min_score": "0.5", "keep.min_lines": "256"},
        **{"measure.frames": str(FRAMES), "measure.fps": str(FPS)},
    },
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if a rule's precision or recall is below 98%, 2 for a mistake in the arguments."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _curated(args), "stopped; the same command goes on from there")


def _curated(args: argparse.Namespace) -> int:
    parts, measured = [], []
    for kind in args.kinds:
        people = args.people[::FOOTAGE_OF] if kind == "video" else args.people
        planted = plant(kind, args.out / kind, people, args.photographs)
        tally, found = outcome(kind, args.out / kind, args.insightface_root, args.face_pack, args.workers)
        parts.append(f"## {kind}: {len(planted):,} items\n\n{table(planted, found)}\n\n```\n{tally}\n```\n")
        print(parts[-1])
        measured += scores(planted, found).values()
    (args.out / TABLE).write_text("\n".join(parts), encoding="utf-8")
    return int(any(min(precision, recall) < WANTED for _, _, precision, recall in measured))


def plant(kind: str, folder: Path, people: Sequence[int], photographs: Path | None = None) -> dict[str, str]:
    """What should become of each item of the corpus in `raw`, which is made as far as it is not there."""
    truth: dict[str, str] = {}
    for seed in people:
        file = folder / TRUTH / f"{seed:05d}.json"
        if not file.is_file():
            write_json(file, PLANTS[kind](folder / "raw", seed, album(photographs) if photographs else None))
        truth |= read_object(file)
    return truth


def settings(kind: str, insightface_root: Path, face_pack: str) -> CurationConfig:
    models = {"measure.insightface_root": str(insightface_root), "measure.face_pack": face_pack}
    return load_settings(CurationConfig, None, _SETTINGS[kind] | models)


def outcome(
    kind: str, folder: Path, insightface_root: Path, face_pack: str, workers: int
) -> tuple[Tally, dict[str, str]]:
    """Curate `raw` into `set`; what became of each item."""
    config = settings(kind, insightface_root, face_pack)
    curated: Kind = "video" if kind == "video" else "pictures"
    return curate(curated, inputs(folder / "raw"), folder / "set", config, workers=workers), became(folder / "set")


def inputs(folder: Path) -> list[Path]:
    """Each source by itself."""
    return sorted(each for each in folder.iterdir() if each.is_dir()) or [folder]


def became(folder: Path) -> dict[str, str]:
    """By name of the item, and number of the clip in it."""
    found, rows = {}, {}
    for file in sorted((folder / "measured").glob("*.jsonl")):
        for row in read_lines(file):
            rows[row["name"], row.get("id", "")] = row.get("clip", 0)
    dropped = {(line["name"], line["id"]): line["rule"] for line in read_lines(folder / DROPPED)}
    kept = {line["id"] for line in read_lines(folder / MANIFEST)}
    for (name, key), number in rows.items():
        label = f"{name}#{number}" if name.endswith(".mp4") else name
        found[label] = dropped.get((name, key)) or (KEPT if key in kept else "nowhere")
    return found


def scores(planted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, tuple[int, int, float, float]]:
    """By rule: how many items were planted for it, how many it took, precision and recall. What may be dropped by
    either of two rules counts by itself."""
    settled = {
        name: planted[name] if rule in planted.get(name, "").split(OR) else rule for name, rule in found.items()
    }
    right = Counter(rule for name, rule in planted.items() if settled.get(name) == rule)
    wanted, taken = Counter(planted.values()), Counter(settled.values())
    return {
        rule: (wanted[rule], taken[rule], right[rule] / max(1, taken[rule]), right[rule] / max(1, wanted[rule]))
        for rule in sorted(wanted | taken)
    }


def table(planted: Mapping[str, str], found: Mapping[str, str]) -> str:
    lines = ["| rule | planted | found | precision | recall |", "|---|---|---|---|---|"]
    for rule, (wanted, taken, precision, recall) in scores(planted, found).items():
        lines.append(f"| {rule} | {wanted} | {taken} | {precision:.1%} | {recall:.1%} |")
    wrong = sorted(name for name in {*planted, *found} if found.get(name) not in planted.get(name, "").split(OR))
    lines += ["", *(f"- {name}: {found.get(name)}, not {planted.get(name)}" for name in wrong)] if wrong else []
    return "\n".join(lines)


def _people(text: str) -> range:
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of people: write first:stop, such as 0:40")
    return range(int(first), int(stop))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(PLANTS), default=list(PLANTS))
    parser.add_argument("--people", type=_people, required=True, help="first:stop")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of the tests' photographs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--insightface-root", type=Path, default=Path("~/.insightface"))
    parser.add_argument("--face-pack", default="buffalo_l")
    return parser


if __name__ == "__main__":
    sys.exit(main())

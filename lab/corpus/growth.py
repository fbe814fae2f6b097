"""`python -m lab.corpus.growth`: memory and time that ever more pictures take, each count in its own processes.

The pictures are photographs of people before drawn walls, 288 px wide, in tar files; all of the code runs that
`pictures` runs, but the detector sees 160 px instead of 640, and text is read at 96 lines instead of 704 and 448. At
last it is decided alone, on copies of what was measured under other names and with other hashes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import multiprocessing
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from mm_core.curation import run, text
from mm_core.curation.config import CurationConfig
from mm_core.curation.items import shards_of
from mm_core.curation.measure import Row
from mm_core.curation.workers import MeasureShard
from mm_core.curation.write import media_path
from mm_core.data.manifest import PICTURES
from mm_core.faces import analysis
from mm_core.files import atomic_write
from mm_core.json_file import read_lines
from mm_core.settings_file import load_settings

from .photographs import Album, album
from .pictures import jpeg, wall

SIDE, _SHARD, _WALLS, _DETECTED, _LINES = 288, 250, 997, (160, 160), 96
_KEEP = {"keep.min_lines": "256", "keep.min_face_size": "40.0", "keep.min_score": "0.5"}


class QuickMeasureShard(MeasureShard):
    """With the small detector."""

    def __init__(self, *arguments: object) -> None:
        analysis.DETECTION_SIZE, text.LINES, text.AGAIN = _DETECTED, _LINES, _LINES
        super().__init__(*arguments)


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    config = load_settings(
        CurationConfig,
        None,
        _KEEP | {"measure.insightface_root": str(args.insightface_root), "measure.face_pack": args.face_pack},
    )
    people = album(args.photographs)
    people = dataclasses.replace(people, scenes=tuple(wall(number, 0, SIDE) for number in range(_WALLS)))
    print("| pictures | kept | seconds of a core | driver, MB | largest worker, MB |\n" + 5 * "|---" + "|", flush=True)
    for count in args.counts:
        shards = [_shard(args.out, people, number) for number in range(count // _SHARD)]
        _report(count, args.out / f"{count}", shards, config)
    for count in args.decided:
        folder = args.out / f"decided-{count}"
        rows = [row for file in sorted(args.out.glob(f"*/{run.MEASURED}/*.jsonl")) for row in read_lines(file)]
        _report(count, folder, _copied(folder, args.out / f"names-{count}", rows, count, config), config)


def _report(count: int, out: Path, shards: list[Path], config: CurationConfig) -> None:
    kept, seconds, most = measured(out, shards, config)
    print(f"| {count:,} | {kept:,} | {seconds:.0f} | {most['driver']:.0f} | {most['worker']:.0f} |", flush=True)


def _copied(out: Path, names: Path, rows: list[Row], count: int, config: CurationConfig) -> list[Path]:
    """Shards that are empty, since all is there that would be made of them: measurements, and the pictures of them."""
    settings = run.measured_with("pictures", config)
    generator, shards = np.random.default_rng(0), []
    for folder in (names, out / run.MEASURED):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(count // _SHARD):
        shards.append(names / f"{number:05d}.tar")
        shards[-1].touch()
        copies = []
        for place in range(number * _SHARD, (number + 1) * _SHARD):
            key, bits = f"{place * 0x9E3779B97F4A7C15 % 2**80:020x}", generator.bytes(32).hex()
            copies.append(rows[place % len(rows)] | {"name": f"{place:07d}", "id": key, "hash": bits})
            media = out / media_path("pictures", copies[-1], config)
            media.parent.mkdir(parents=True, exist_ok=True)
            media.touch()
        file = out / run.MEASURED / f"{shards_of(shards[-1], PICTURES)[0].key(settings)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in copies))
    return shards


def _shard(folder: Path, people: Album, number: int) -> Path:
    path = folder / "raw" / f"{number:05d}.tar"
    if not path.is_file():
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for item in range(number * _SHARD, (number + 1) * _SHARD):
                picture, text = people.photo(item, SIDE)
                for suffix, content in ((".jpg", jpeg(picture)), (".txt", text.encode())):
                    entry = tarfile.TarInfo(f"{item:07d}{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return path


def measured(out: Path, shards: list[Path], config: CurationConfig) -> tuple[int, float, dict[str, float]]:
    """How many were kept, seconds of a core in all, and the most that the driver and a worker had in memory."""
    most, seconds = defaultdict[str, float](float), dict[int, float]()
    context = multiprocessing.get_context("spawn")
    kept = context.SimpleQueue()
    process = context.Process(target=_curate, args=(out, shards, config, kept))
    process.start()
    driver = psutil.Process(process.pid)
    while process.is_alive():
        for each in (driver, *_children(driver)):
            try:
                with each.oneshot():
                    who = "driver" if each == driver else "worker" if each.name().startswith("ray::") else "ray"
                    most[who] = max(most[who], each.memory_info().rss / 1e6)
                    if who != "ray":
                        seconds[each.pid] = sum(each.cpu_times()[:2])
            except psutil.Error:
                continue
        time.sleep(0.2)
    if process.exitcode:
        sys.exit(process.exitcode)
    return kept.get(), sum(seconds.values()), most


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _curate(out: Path, shards: list[Path], config: CurationConfig, kept: object) -> None:
    run.MeasureShard = QuickMeasureShard
    kept.put(run.curate("pictures", shards, out, config, workers=1).kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.corpus.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 4000, 16000])
    parser.add_argument("--decided", type=int, nargs="*", default=[50000], help="of how many it is only decided")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of the tests' photographs")
    parser.add_argument("--insightface-root", type=Path, default=Path("~/.insightface"))
    parser.add_argument("--face-pack", default="buffalo_l")
    return parser


if __name__ == "__main__":
    importlib.import_module("lab.corpus.growth").main()  # by the name by which workers find the class

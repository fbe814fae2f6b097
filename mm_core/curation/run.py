"""From raw inputs to a training set, on Ray Data: measure, decide, write.

Shards are measured and written by workers, wherever they are; each result is a file that is whole or absent, under a
name that says what was measured and how. Who is killed goes on with those that are missing, and how many workers there
are, and in which order they finish, changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ..data.manifest import MANIFEST, PICTURES, VIDEOS
from ..errors import SettingError
from ..files import write_json, write_lines, write_text
from ..json_file import read_lines
from ..names import is_below
from .config import CurationConfig, Kind
from .items import Shard, shards_of
from .measure import Measurer, Row
from .neighbours import duplicates, repeated_identities
from .page import render_page
from .rules import judged, rules
from .tally import Tally
from .workers import MeasureShard, Workers, write_task
from .write import check_written, files_of, samples

FORMAT = 3
"""Of the measurements: another one measures again."""
MEASURED, DROPPED, SUMMARY, PAGE = "measured", "dropped.jsonl", "summary.json", "report.html"
_REMEMBERED = ("name", "id", "of", "size", "hash", "suffix", "reference", "identity", "keys", "frames")
"""Of a row that passed: what `neighbours` and the page want of all at once. The rest is read again where it is written,
so that memory hardly depends on how much there is."""
Progress = Callable[[str, int, int], None]
"""measured or written, how many shards are done, and of how many."""


class Passed(NamedTuple):
    """A row that passed: the number of its shard, its place in what was measured of it, and what is remembered."""

    shard: int
    place: int
    row: Row


def curate(
    kind: Kind,
    inputs: Sequence[Path],
    output: Path,
    config: CurationConfig,
    *,
    address: str | None = None,
    workers: int | None = None,
    on_progress: Progress = lambda what, done, of: None,
) -> Tally:
    """Write `manifest.jsonl`, the files that it names, and what was dropped and why, into a folder.

    address: of a Ray cluster whose machines share inputs, output and this code by the same paths; None: this machine.
    workers: processes; None: one for each core.

    Raises SettingError for no workers and for inputs that hold nothing, or the output, CheckpointError for models that
    are missing.
    """
    output = output.expanduser().resolve()
    if workers is not None and workers < 1:
        raise SettingError(f"workers is {workers}; it must be 1 or more, or left out for one for each core.")
    for path in inputs:
        if is_below(output, path.expanduser()):
            raise SettingError(f"{output} lies in the input {path}, where it would be looked at; choose another --out.")
    shards = [shard for path in inputs for shard in shards_of(path, VIDEOS if kind == "video" else PICTURES)]
    settings = measured_with(kind, config)
    files = [output / MEASURED / f"{shard.key(settings)}.jsonl" for shard in shards]
    missing = [(shard, file) for shard, file in zip(shards, files) if not file.is_file()]
    tally = Tally(kind, config)
    with Workers(address, workers) as pool:
        if missing:
            Measurer(config.measure)  # what is wrong with the models is told here, not by a worker
            tasks = [{"shard": dataclasses.asdict(shard), "file": str(file)} for shard, file in missing]
            for seconds in pool.each(MeasureShard, (kind, config), tasks, lambda *at: on_progress("measured", *at)):
                tally.seconds.update(seconds)
        kept = _decide(kind, config, shards, files, tally, output)
        by_shard = {number: list(some) for number, some in groupby(kept, lambda each: each.shard)}
        unwritten = [
            number
            for number, some in by_shard.items()
            if not all((output / path).is_file() for each in some for path in files_of(kind, each.row, config))
        ]
        tasks = [_write_task(shards[number], files[number], by_shard[number]) for number in unwritten]
        for _ in pool.each(write_task, (kind, config, output), tasks, lambda *at: on_progress("written", *at)):
            pass
    whole = _whole(by_shard, shards, files, tally)
    lines = [check_written(output, line) for line in samples(kind, whole, [each.row for each in kept], config)]
    write_lines(output / MANIFEST, sorted(lines, key=lambda line: line["id"]))
    write_json(output / SUMMARY, tally.to_json())
    write_text(output / PAGE, render_page(tally, shards))
    return tally


def measured_with(kind: Kind, config: CurationConfig) -> dict[str, Any]:
    """What measurements depend on, beside their shard."""
    settings = dataclasses.asdict(config.measure) | {"kind": kind, "format": FORMAT}
    del settings["insightface_root"]
    return settings


def _write_task(shard: Shard, file: Path, kept: Sequence[Passed]) -> dict[str, Any]:
    return {"shard": dataclasses.asdict(shard), "measured": str(file), "places": [each.place for each in kept]}


def _rows(shard: Shard, file: Path) -> list[Row]:
    """What was measured of a shard."""
    rows = read_lines(file)
    for row in rows:
        row["source"], row["licence"] = row["source"] or shard.source, row["licence"] or shard.licence
    return rows


def _whole(
    kept: Mapping[int, Sequence[Passed]], shards: Sequence[Shard], files: Sequence[Path], tally: Tally
) -> Iterator[Row]:
    """All of each row that is kept, by the numbers of the shards, for the tally as well."""
    for number, some in kept.items():
        rows = _rows(shards[number], files[number])
        for each in some:
            tally.keep(number, rows[each.place])
            yield rows[each.place]


def _decide(
    kind: Kind, config: CurationConfig, shards: Sequence[Shard], files: Sequence[Path], tally: Tally, output: Path
) -> list[Passed]:
    """What is kept, in the order of the shards; the others go into `dropped.jsonl`, all into the tally."""
    passed: list[Passed] = []

    def dropped() -> Iterator[dict[str, str]]:
        asked = rules(kind, config.measure)
        for number, (shard, file) in enumerate(zip(shards, files)):
            for place, row in enumerate(_rows(shard, file)):
                why = judged(row, asked, config.keep)
                tally.measure(row)
                if why is None:
                    passed.append(Passed(number, place, {name: row[name] for name in _REMEMBERED if name in row}))
                else:
                    yield tally.drop(number, row, why)
        for find in (duplicates, *([repeated_identities] if kind == "pairs" else [])):
            found = find([each.row for each in passed], config.keep)
            yield from (tally.drop(passed[at].shard, passed[at].row, found[at]) for at in sorted(found))
            passed[:] = [each for at, each in enumerate(passed) if at not in found]

    write_lines(output / DROPPED, dropped())
    return passed

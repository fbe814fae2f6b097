"""From raw inputs to a training set, on Ray Data: measure, decide, write.

Shards are measured and written by workers, wherever they are; each result is a file that is whole or absent, under a
name that says what was measured and how. Who is killed goes on with those that are missing, and how many workers there
are, and in which order they finish, changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..data.manifest import MANIFEST, PICTURES, VIDEOS
from ..errors import SettingError
from ..files import atomic_write, write_json, write_lines
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

FORMAT = 2
"""Of the measurements: another one measures again."""
MEASURED, DROPPED, SUMMARY, PAGE = "measured", "dropped.jsonl", "summary.json", "report.html"
Progress = Callable[[str, int, int], None]
"""measured or written, how many shards are done, and of how many."""


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
    settings = dataclasses.asdict(config.measure) | {"kind": kind, "format": FORMAT}
    del settings["insightface_root"]
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
        lines = samples(kind, [row for _, row in kept], config)
        by_shard: dict[int, list[Row]] = {}
        for number, row in kept:
            by_shard.setdefault(number, []).append(row)
        tasks = [
            {"shard": dataclasses.asdict(shards[number]), "rows": rows}
            for number, rows in by_shard.items()
            if not all((output / path).is_file() for row in rows for path in files_of(kind, row, config))
        ]
        for _ in pool.each(write_task, (kind, config, output), tasks, lambda *at: on_progress("written", *at)):
            pass
    check_written(output, lines)
    write_lines(output / MANIFEST, lines)
    write_json(output / SUMMARY, tally.to_json())
    with atomic_write(output / PAGE) as temporary:
        temporary.write_text(render_page(tally, shards), encoding="utf-8")
    return tally


def _decide(
    kind: Kind, config: CurationConfig, shards: Sequence[Shard], files: Sequence[Path], tally: Tally, output: Path
) -> list[tuple[int, Row]]:
    """The rows that are kept, each with its shard's number; the others go into `dropped.jsonl`, all into the tally."""
    passed: list[tuple[int, Row]] = []

    def dropped() -> Iterator[dict[str, str]]:
        asked = rules(kind, config.measure)
        for number, (shard, file) in enumerate(zip(shards, files)):
            for row in read_lines(file):
                row["source"], row["licence"] = row["source"] or shard.source, row["licence"] or shard.licence
                why = judged(row, asked, config.keep)
                tally.measure(row)
                if why is None:
                    passed.append((number, row))
                else:
                    yield tally.drop(number, row, why)
        for find in (duplicates, *([repeated_identities] if kind == "pairs" else [])):
            found = find([row for _, row in passed], config.keep)
            yield from (tally.drop(*passed[at], found[at]) for at in sorted(found))
            passed[:] = [each for at, each in enumerate(passed) if at not in found]

    write_lines(output / DROPPED, dropped())
    for number, row in passed:
        tally.keep(number, row)
    return passed

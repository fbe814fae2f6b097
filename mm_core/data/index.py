"""The index of a folder of features, made from the headers of its shards once all of them are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MagicMirrorError
from ..json_file import read_object
from .features import SETTINGS, UNKNOWN, header_of, seen_in, shard_name
from .manifest import Sample


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one file of features is made of."""

    kind: str
    """`prompts`, `references` or `samples`."""
    number: int
    items: Sequence[Any]

    @property
    def file(self) -> str:
        return shard_name(self.kind, self.number)


def build_index(folder: Path, samples: Sequence[Sample], shards: Sequence[Shard]) -> dict[str, Any]:
    """What `Features` opens. Raises MagicMirrorError if there is not one sample."""
    rows: dict[str, dict[str, dict[str, int]]] = {"prompts": {}, "references": {}, "samples": {}}
    left_out: dict[str, dict[str, list[str]]] = {kind: {} for kind in rows}
    files, looked_at, seen, licences, padded = [], 0, 0, Counter(), set()
    for shard in shards:
        path = folder / shard.file
        header = header_of(path)
        files.append({"file": path.name, "bytes": path.stat().st_size})
        rows[shard.kind] |= {name: {"shard": shard.number, "row": row} for row, name in enumerate(header["rows"])}
        left_out[shard.kind] |= header["skipped"]
        padded.update(header.get("padded", ()))
        if shard.kind == "samples" and header["rows"]:
            faces = seen_in(path)
            looked_at, seen = looked_at + faces.numel(), seen + int(faces.sum())
    numbers = {kind: {name: number for number, name in enumerate(rows[kind])} for kind in ("prompts", "references")}
    entries = []
    for sample in samples:
        known = [numbers["references"][path] for path in sample.references if path in numbers["references"]]
        if sample.id in rows["samples"] and known:
            licences[sample.licence or UNKNOWN] += 1
            entry = {"id": sample.id, "person": sample.person, "references": known}
            entries.append(entry | {"prompt": numbers["prompts"][sample.caption]} | rows["samples"][sample.id])
        elif not known:
            why = left_out["references"][sample.references[0]]
            left_out["samples"].setdefault(sample.id, [f"no usable reference: {why[0]}", why[1]])
    counts = {kind: dict(Counter(why for why, _ in left_out[kind].values())) for kind in ("references", "samples")}
    if not entries:
        raise MagicMirrorError(f"Not one of {len(samples)} samples can be used: {counts}. Check the data set first.")
    return {
        "settings": read_object(folder / SETTINGS),
        "counts": {
            "samples": len(entries),
            "references": len(numbers["references"]),
            "frames looked at": looked_at,
            "frames with a face": seen,
            "padded": sum(entry["id"] in padded for entry in entries),
            "skipped": counts,
        },
        "skipped": {kind: left_out[kind] for kind in ("references", "samples")},
        "licences": dict(sorted(licences.items())),
        "shards": files,
        "prompts": list(rows["prompts"].values()),
        "references": [{"path": path} | row for path, row in rows["references"].items()],
        "samples": entries,
    }

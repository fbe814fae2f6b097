"""A benchmark's results side by side, as Markdown and CSV: quality, likeness and cost (the paper's Tab. 1, 5 and 6)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..files import write_text
from .generate import COSTS

RESULTS = "results.json"
COLUMNS = {
    "quality": {
        "dynamic degree": "success_motion", "text": "text_alignment", "IS": "inception_score",
        "smoothness": "smoothness", "motion, px": "motion_px", "motion amplitude, px": "motion_amplitude",
    },
    "likeness": {
        "ID similarity": "id_similarity", "by dlib": "id_similarity_dlib", "by SFace": "id_similarity_sface",
        "FaceSim-Arc": "facesim_arc", "FaceSim-Cur": "facesim_cur", "decay": "id_decay", "FM_ref": "fm_ref",
        "FM_inter": "fm_inter", "frames with a face": "face_rate", "accepted": "success_identity",
        "at yaw 0 to 20": "success_yaw_20", "20 to 45": "success_yaw_45", "beyond": "success_yaw_beyond",
    },
    "cost": {"seconds a clip": "seconds", "GiB": "gib", "clips": "clips", "frames": "frames", "size": "size",
             "device": "device"},
}  # fmt: skip
PAPER = {  # as its authors report them, for 49 frames of 480 x 720; other face models, units and scales than here
    "Magic Mirror": {
        "success_motion": 0.705, "text_alignment": 0.240, "inception_score": 10.59, "smoothness": 0.484,
        "id_similarity": 0.922, "id_decay": 0.002, "fm_ref": 0.730, "fm_inter": 0.610, "seconds": 209, "gib": 28.6,
    },
    "CogVideoX": {"seconds": 204, "gib": 24.9},
    "ConsisID": {
        "success_motion": 0.615, "text_alignment": 0.236, "inception_score": 11.09, "smoothness": 0.513,
        "id_similarity": 0.913, "id_decay": 0.002, "fm_ref": 0.652, "fm_inter": 0.601,
    },
    "ID-Animator": {
        "success_motion": 0.140, "text_alignment": 0.211, "inception_score": 7.57, "smoothness": 0.515,
        "id_similarity": 0.923, "id_decay": 0.005, "fm_ref": 0.652, "fm_inter": 0.181,
    },
}  # fmt: skip
_PAPER_RUN = {"frames": 49, "size": "720 x 480", "device": "A800"}


class Value(NamedTuple):
    """A cell: None where nothing was measured; low and high: its 95% interval, where it has one."""

    value: Any = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        text = f"{self.value:.3f}" if isinstance(self.value, float) else str(self.value)
        return text if self.low is None else f"{text} ({self.low:.3f} to {self.high:.3f})"


def write_tables(folder: Path) -> list[Path]:
    """Compare all systems that have a folder with results in `folder`: table.md and table.csv there."""
    rows = {path.parent.name: _measured(path) for path in sorted(folder.glob(f"*/{RESULTS}"))}
    for name, reported in PAPER.items():
        more = _PAPER_RUN if "seconds" in reported else {}
        rows[f"{name}, reported by the paper"] = {key: Value(value) for key, value in (reported | more).items()}
    texts = {"table.md": "\n".join([*_markdown(rows), ""]), "table.csv": _csv(rows)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _measured(results: Path) -> dict[str, Value]:
    """All values of a system, by their names in its files."""
    found = json.loads(results.read_text(encoding="utf-8"))
    summary = found["summary"] or {"means": {}, "intervals": {}, "clips": 0}
    values = summary["means"] | {name: value for name, value in summary.items() if isinstance(value, int | float)}
    values["inception_score"] = found["inception_score"]
    costs = [json.loads(path.read_text(encoding="utf-8")) for path in results.parent.glob(f"{COSTS}/*.json")]
    if costs:
        values["seconds"] = float(median(cost["seconds"] for cost in costs))
        values["gib"] = max(cost["gib"] for cost in costs)
        values["frames"] = "/".join(sorted({str(cost["frames"]) for cost in costs}))
        values["size"] = ", ".join(sorted({f"{cost['width']} x {cost['height']}" for cost in costs}))
        values["device"] = ", ".join(sorted({cost["device"] for cost in costs}))
    intervals = summary["intervals"]
    return {name: Value(value, *intervals.get(name, ())) for name, value in values.items()}


def _markdown(rows: dict[str, dict[str, Value]]) -> Iterator[str]:
    for title, columns in COLUMNS.items():
        shown = {name: row for name, row in rows.items() if any(key in row for key in columns.values())}
        yield f"## {title.capitalize()}\n\n| system | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
        for name, row in shown.items():
            yield f"| {name} | {' | '.join(str(row.get(key, Value())) for key in columns.values())} |"
        yield ""
    yield "In brackets: 95% intervals over people. Rows of the paper have its own face model, units and scales."


def _csv(rows: dict[str, dict[str, Value]]) -> str:
    """A line for each system and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "system", "measure", "value", "low", "high"])
    for title, columns in COLUMNS.items():
        for name, row in rows.items():
            writer.writerows([title, name, key, *row[key]] for key in columns.values() if key in row)
    return text.getvalue()

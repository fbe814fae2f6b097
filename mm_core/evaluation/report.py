"""Results as files: results.json, results.csv and report.html, each there whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..files import write_text
from .page import render_page
from .run import Evaluation
from .scores import ClipScores

DIGITS = 6  # decimals in the files


def write_report(folder: Path, evaluation: Evaluation, settings: Mapping[str, Any]) -> list[Path]:
    """Write the three files into a folder, made if needed, and return their paths. settings: how it was measured."""
    texts = {
        "results.json": json.dumps(to_json(evaluation, settings), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "results.csv": to_csv(evaluation),
        "report.html": render_page(evaluation, settings),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def to_json(evaluation: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the pictures; what could not be measured is null."""
    summary = asdict(evaluation.summary) if evaluation.clips else None
    clips = [
        {
            "video": clip.name,
            "identity": clip.person.name,
            "references": len(clip.person.photos),
            "width": clip.analysis.size[0],
            "height": clip.analysis.size[1],
            "scores": asdict(clip.scores),
            "similarity": clip.similarity.tolist(),
        }
        for clip in evaluation.clips
    ]
    skipped = [asdict(left_out) for left_out in evaluation.skipped]
    scores = {"summary": summary, "inception_score": evaluation.inception_score, "clips": clips, "skipped": skipped}
    return _plain({"settings": dict(settings), **scores})


def to_csv(evaluation: Evaluation) -> str:
    """One line for each measured clip; an empty cell is what could not be measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(ClipScores)]
    writer.writerow(["video", "identity", *names])
    for clip in evaluation.clips:
        values = _plain([vars(clip.scores)[name] for name in names])
        writer.writerow([clip.name, clip.person.name, *("" if value is None else value for value in values)])
    return text.getvalue()


def _plain(value: Any) -> Any:
    """Rounded floats, None for NaN; lists and dicts likewise."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, DIGITS)
    return value

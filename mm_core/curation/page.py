"""report.html: one page without outside files, by which thresholds are chosen: counts, histograms, examples."""

from __future__ import annotations

import io
from collections.abc import Iterator
from html import escape
from itertools import pairwise

import av
import numpy as np

from ..errors import MagicMirrorError
from ..evaluation.page import STYLE, figure, thumbnail
from ..faces.references import decode_image
from .clips import clip_frames
from .config import Keeping
from .items import Item, Shard
from .measure import Row
from .rules import Limit
from .tally import Example, Tally

_WIDTH, _HEIGHT, _MARGIN = 720, 130, 24
_BINS = 48
_KEPT, _DROPPED, _LINE = "#1565c0", "#c9b8b8", "#c80"


def render_page(tally: Tally, shards: list[Shard]) -> str:
    """The HTML of the whole page. shards: whose numbers the tally's examples have."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Training set</title><style>'
        f"{STYLE.read_text(encoding='utf-8')} figure {{ max-width: 16em; vertical-align: top }}</style>",
        f"<h1>{tally.kept:,} of {tally.items:,} {'clips' if tally.kind == 'video' else tally.kind} kept</h1>",
        "<p>An item is dropped by the first rule that it breaks. Histograms show all items that could be measured, the "
        "kept range in blue. To choose another threshold, run the same command with it: nothing is measured again.</p>",
        _counts(tally),
        *(_histogram(limit, np.asarray(tally.values[limit.name]), tally.config.keep) for limit in tally.limits),
    ]
    pictures = _pictures(tally, shards)
    for name in sorted(tally.examples, key=lambda name: (name != "kept", name)):
        figures = [_figure(example, pictures) for example in tally.examples[name]]
        title = "Kept" if name == "kept" else f"Dropped: {escape(name)}"
        parts.append(f"<section><h2>{title}, the first {len(figures)}</h2>{''.join(figures)}</section>")
    return "\n".join(parts) + "\n</html>\n"


def _counts(tally: Tally) -> str:
    rows = [("kept", tally.kept), *tally.dropped.most_common()]
    rows += [(f"licence {name}", count) for name, count in tally.licences.most_common()]
    rows += [(f"source {name}", count) for name, count in tally.sources.most_common(20)]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{count:,}</td><td>{count / max(1, tally.items):.1%}</td></tr>"
        for name, count in rows
    )
    return f"<table><tr><th></th><th>items</th><th>of all</th></tr>{body}</table>"


def _histogram(limit: Limit, values: np.ndarray, keep: Keeping) -> str:
    """An <svg> of how many items have which value, with the thresholds as lines."""
    thresholds = {name: float(getattr(keep, name)) for name in (limit.least, limit.most) if name is not None}
    low, high = min(thresholds.values()), max(thresholds.values())
    if not len(values):
        return ""
    start, stop = min(low, *np.quantile(values, [0.01])), max(high, *np.quantile(values, [0.99]))
    start, stop = (start, stop) if stop > start else (start - 0.5, stop + 0.5)
    least, most = thresholds.get(limit.least or "", -np.inf), thresholds.get(limit.most or "", np.inf)
    inside = (values >= least) & (values <= most)
    shown = values.clip(start, stop)
    counts, edges = np.histogram(shown, _BINS, (start, stop))
    kept, _ = np.histogram(shown[inside], edges)

    def x(value: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * (value - start) / (stop - start)

    shapes = []
    for bars, colour in ((counts, _DROPPED), (kept, _KEPT)):
        for count, (left, right) in zip(bars, pairwise(edges)):
            height = (_HEIGHT - 2 * _MARGIN) * count / counts.max()
            at = f'x="{x(left):.1f}" y="{_HEIGHT - _MARGIN - height:.1f}" width="{x(right) - x(left) - 0.5:.1f}"'
            shapes.append(f'<rect {at} height="{height:.1f}" fill="{colour}"/>')
    for name, value in thresholds.items():
        line = f'x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_MARGIN - 8}" y2="{_HEIGHT - _MARGIN}"'
        shapes.append(f'<line {line} stroke="{_LINE}" stroke-width="2"/>')
        place = "end" if x(value) > _WIDTH / 2 else "start"
        text = f"--set keep.{name}={value:g}"
        shapes.append(f'<text x="{x(value):.1f}" y="{_MARGIN - 10}" text-anchor="{place}" fill="#850">{text}</text>')
    for value, place in ((start, "start"), (stop, "end")):
        shapes.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - 8}" text-anchor="{place}">{value:.3g}</text>')
    title = f"{escape(limit.name)}, {escape(limit.unit)}: {int((~inside).sum()):,} of {len(values):,} outside"
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<h2>{title}</h2><svg {size} font-size="11" font-family="sans-serif">{"".join(shapes)}</svg>'


def _pictures(tally: Tally, shards: list[Shard]) -> dict[tuple[int, str], str]:
    """Data URLs of the examples, by shard and id; those that cannot be read are left out."""
    wanted: dict[int, dict[str, list[Row]]] = {}
    for number, row, _ in (example for shown in tally.examples.values() for example in shown):
        if "size" in row:
            wanted.setdefault(number, {}).setdefault(row["name"], []).append(row)
    found = {}
    for number, by_name in wanted.items():
        for item in shards[number].items():
            for row in by_name.pop(item.name, ()):
                for picture in _picture(item, row):
                    found[number, row["id"]] = thumbnail(picture)
            if not by_name:
                break
    return found


def _picture(item: Item, row: Row) -> Iterator[np.ndarray]:
    """The picture, or the frame in the middle of the clip; nothing if the input changed since."""
    try:
        if "frames" in row:
            with item.on_disk() as path:
                yield clip_frames(path, [row["frames"][len(row["frames"]) // 2]])[0]
        else:
            yield decode_image(io.BytesIO(item.read()), item.name)
    except (MagicMirrorError, av.FFmpegError, OSError):
        return


def _figure(example: Example, pictures: dict[tuple[int, str], str]) -> str:
    number, row, why = example
    text = ": ".join(filter(None, (row["name"], why or row["caption"])))
    url = pictures.get((number, row.get("id", "")))
    return figure(url, text[:160]) if url else f"<p>{escape(text[:300])}</p>"

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
from ..picture_file import decode_image
from ..video_reader import open_video, rgb
from .config import Keeping
from .items import Item, Shard
from .measure import Row
from .rules import Limit
from .tally import DROPPED, KEPT, Example, Tally

_BINS = 48
_TICKS = 5
_KEPT, _DROPPED, _LINE = "#1976d2", "#b3a1a1", "#e08000"
_STYLE = """
figure { width: 10em; vertical-align: top } section { margin: 1.5em 0 }
h2 { margin: 1.4em 0 .2em } h3 { margin: .8em 0 .3em }
small { font-weight: normal; font-size: .7em; padding-left: .6em }
svg { display: block; width: 100%; max-width: 720px; height: 90px; border-bottom: 1px solid }
.ticks { display: flex; justify-content: space-between; max-width: 720px; font-size: 12px }
"""


def render_page(tally: Tally, shards: list[Shard]) -> str:
    """The HTML of the whole page. shards: whose numbers the tally's examples have."""
    pictures = _pictures(tally, shards)

    def examples(title: str, kind: str, name: str) -> str:
        shown = [_figure(example, pictures) for _, example in tally.shown.get((kind, name), ())]
        return f"<h3>{title}</h3>{''.join(shown)}" if shown else ""

    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Training set</title><style>{STYLE.read_text(encoding='utf-8')}{_STYLE}</style>",
        f"<h1>{tally.kept:,} of {tally.items:,} {'clips' if tally.kind == 'video' else tally.kind} kept</h1>",
        "<p>An item is dropped by the first rule that it breaks; the rules are below in their order. Histograms show "
        "all items that could be measured, in blue what the rule lets pass, and their bars tell their numbers. The "
        "pictures are the nearest to the threshold on either side: a stricter one drops the first row, a looser one "
        "lets the second pass. To choose another, run the same command with it, spelled as here: nothing is measured "
        "again.</p>",
        _counts(tally),
    ]
    for limit in tally.limits:
        values = np.asarray(tally.values[limit.name])
        if len(values):
            rows = [
                examples(f"{title} <code>{name}</code>", kind, name)
                for name in _thresholds(limit, tally.config.keep)
                for title, kind in (("Kept, nearest to", KEPT), ("Dropped, nearest to", DROPPED))
            ]
            parts.append(f"<section>{_histogram(limit, values, tally)}{''.join(rows)}</section>")
    others = tally.dropped.keys() - {limit.name for limit in tally.limits}
    parts += [examples(f"Dropped: {escape(name)}, the first", DROPPED, name) for name in sorted(others)]
    parts.append(examples("Kept, the first", KEPT, ""))
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


def _thresholds(limit: Limit, keep: Keeping) -> dict[str, float]:
    return {name: float(getattr(keep, name)) for name in (limit.least, limit.most) if name is not None}


def _histogram(limit: Limit, values: np.ndarray, tally: Tally) -> str:
    """How many items have which value, (N,), as an <svg> that is as wide as the window, the thresholds as lines."""
    thresholds = _thresholds(limit, tally.config.keep)
    start = min(*thresholds.values(), *np.quantile(values, [0.01]))
    stop = max(*thresholds.values(), *np.quantile(values, [0.99]))
    start, stop = (start, stop) if stop > start else (start - 0.5, stop + 0.5)
    least, most = thresholds.get(limit.least or "", -np.inf), thresholds.get(limit.most or "", np.inf)
    inside = (values >= least) & (values <= most)
    shown = values.clip(start, stop)
    counts, edges = np.histogram(shown, _BINS, (start, stop))
    kept, _ = np.histogram(shown[inside], edges)
    shapes = []
    for place, (count, passed, (low, high)) in enumerate(zip(counts, kept, pairwise(edges))):
        told = f"<title>{_number(low)} to {_number(high)}: {passed:,} of {count:,} pass</title>"
        bars = "".join(
            f'<rect x="{place + 0.04:g}" y="{1 - height:.4f}" width=".92" height="{height:.4f}" fill="{colour}"/>'
            for height, colour in ((count / counts.max(), _DROPPED), (passed / counts.max(), _KEPT))
        )
        # What is pointed at is as high as the picture: a bar may be low.
        shapes.append(f'<g>{told}<rect x="{place}" width="1" height="1" opacity="0"/>{bars}</g>')
    for value in thresholds.values():
        at = _BINS * (value - start) / (stop - start)
        line = f'x1="{at:.3f}" x2="{at:.3f}" y1="0" y2="1"'
        shapes.append(f'<line {line} stroke="{_LINE}" stroke-width="2" vector-effect="non-scaling-stroke"/>')
    ticks = "".join(f"<span>{_number(value)}</span>" for value in np.linspace(start, stop, _TICKS))
    said = f"{int((~inside).sum()):,} of {len(values):,} outside, {tally.dropped[limit.name]:,} dropped by it"
    spelled = " ".join(f"<code>--set keep.{name}={value:g}</code>" for name, value in thresholds.items())
    return (
        f"<h2>{escape(limit.name)}, {escape(limit.unit)}<small>{said}</small></h2>{spelled}"
        f'<svg viewBox="0 0 {_BINS} 1" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f'<div class="ticks">{ticks}</div>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _pictures(tally: Tally, shards: list[Shard]) -> dict[tuple[int, str], str]:
    """Data URLs of the examples, by shard and id; those that cannot be read are left out."""
    wanted: dict[int, dict[str, dict[str, Row]]] = {}
    for number, row, _ in (example for shown in tally.shown.values() for _, example in shown):
        if "size" in row:
            wanted.setdefault(number, {}).setdefault(row["name"], {})[row["id"]] = row
    found = {}
    for number, by_name in wanted.items():
        for item in shards[number].items():
            for row in by_name.pop(item.name, {}).values():
                for picture in _picture(item, row):
                    found[number, row["id"]] = thumbnail(picture)
            if not by_name:
                break
    return found


def _picture(item: Item, row: Row) -> Iterator[np.ndarray]:
    """The picture, or a frame near the middle of the clip; nothing if the input changed since."""
    try:
        if "frames" in row:
            with item.on_disk() as path, open_video(path) as container:
                stream = container.streams.video[0]
                at = row["frames"][len(row["frames"]) // 2] / (stream.average_rate or 25)
                container.seek(int(at * av.time_base))  # to a keyframe before: footage may be hours long
                frames = container.decode(stream)
                yield rgb(next(frame for frame in frames if frame.time is None or frame.time >= at), container)
        else:
            yield decode_image(io.BytesIO(item.read()), item.name)
    except (MagicMirrorError, av.FFmpegError, OSError, StopIteration):
        return


def _figure(example: Example, pictures: dict[tuple[int, str], str]) -> str:
    number, row, said = example
    text = ": ".join(filter(None, (row["name"], said or row["caption"])))
    url = pictures.get((number, row.get("id", "")))
    return figure(url, text[:160]) if url else f"<p>{escape(text[:300])}</p>"

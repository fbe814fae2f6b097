"""Likeness over time as an SVG picture in a page, by matplotlib."""

from __future__ import annotations

import base64
import io

import numpy as np

LOWEST, HIGHEST = -0.2, 1.0  # cosines; rarer ones below are drawn at the edge
NO_MATPLOTLIB = "The plot needs matplotlib: python -m pip install matplotlib"


def similarity_plot(similarity: np.ndarray, threshold: float) -> str:
    """An <img> of (F,) cosines over frames; frames without a face (NaN) are gaps, marked in red at the bottom.

    Without matplotlib, a line that says so.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return f'<p class="bad">{NO_MATPLOTLIB}</p>'
    missing = np.flatnonzero(np.isnan(similarity))
    figure = Figure(figsize=(7.5, 2), layout="constrained")
    axes = figure.add_subplot(ylim=(LOWEST, HIGHEST), ylabel="similarity")
    axes.grid(axis="y", color="#ddd")
    axes.axhline(threshold, color="#c80", linestyle="--")
    axes.plot(np.clip(similarity, LOWEST, HIGHEST), "o-", markersize=3, color="#1565c0", clip_on=False)
    axes.plot(missing, np.full(len(missing), LOWEST), "|", markersize=16, color="#b00020", clip_on=False)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):  # the same bytes every time; text as text
        figure.savefig(file, format="svg", metadata={"Date": None})
    url = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img class="plot" src="{url}" alt="ID similarity over frames">'

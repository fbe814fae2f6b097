"""A curve as SVG, by hand: the project needs no plotting library for one kind of plot."""

from __future__ import annotations

import numpy as np

WIDTH, HEIGHT = 720, 190  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 28  # margins
LOWEST, HIGHEST = -0.2, 1.0  # cosines; rarer ones below are drawn at the edge


def similarity_plot(similarity: np.ndarray, threshold: float) -> str:
    """An <svg> of (F,) cosines over frames; frames without a face (NaN) are gaps, marked in red at the bottom."""
    frames = len(similarity)
    points = [(_x(index, frames), _y(value)) for index, value in enumerate(similarity)]
    runs: list[list[tuple[float, float]]] = [[]]
    for value, point in zip(similarity, points):
        if np.isnan(value):
            runs.append([])
        else:
            runs[-1].append(point)
    shapes = [
        _grid(frames),
        _line(LEFT, _y(threshold), WIDTH - RIGHT, _y(threshold), 'stroke="#c80" stroke-dasharray="5 4"'),
    ]
    for run in filter(None, runs):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="#1565c0" stroke-width="1.6"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#1565c0"/>' for x, y in run]
    edge = HEIGHT - BOTTOM
    missing = [_x(int(index), frames) for index in np.flatnonzero(np.isnan(similarity))]
    shapes += [_line(x, edge - 8, x, edge, 'stroke="#b00020" stroke-width="2"') for x in missing]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-size="11" '
        f'font-family="sans-serif" role="img" aria-label="ID similarity over frames">{"".join(shapes)}</svg>'
    )


def _grid(frames: int) -> str:
    shapes = []
    for value in np.arange(LOWEST, HIGHEST + 0.01, 0.2):
        y = _y(value)
        shapes.append(_line(LEFT, y, WIDTH - RIGHT, y, 'stroke="#ddd"'))
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value + 0:.1f}</text>')
    for index in sorted({0, (frames - 1) // 2, frames - 1}):
        x = _x(index, frames)
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">{index}</text>')
    return "".join(shapes)


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {style}/>'


def _x(index: int, frames: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT - 12) * index / max(1, frames - 1) + 6


def _y(value: float) -> float:
    part = (HIGHEST - np.clip(value, LOWEST, HIGHEST)) / (HIGHEST - LOWEST)
    return float(TOP + (HEIGHT - TOP - BOTTOM) * part)

"""A z-buffer rasteriser on the CPU, compiled by numba; single-threaded, so that a picture is the same every time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

NOTHING = -1
"""Triangle index of a pixel that no triangle covers."""
FAR = -1e9
_SMALLEST_AREA = 1e-9


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which triangle is nearest at each pixel.

    triangle: (H, W) int32, index of the triangle or NOTHING.
    barycentric: (H, W, 2) float32, weights of the triangle's second and third corner.
    depth: (H, W) float32, larger is nearer; FAR where there is nothing.
    """

    triangle: np.ndarray
    barycentric: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True, eq=False)
class Cutout:
    """Holes in triangles: a pixel is kept where a height map rises above the threshold of the triangle.

    coordinates: (V, 2) float32 column and row in the height map of each vertex.
    heights: (H, W) float32.
    thresholds: (V,) float32; the first corner's counts; 0 for triangles without holes.
    """

    coordinates: np.ndarray
    heights: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def none(cls, vertices: int) -> Cutout:
        """No holes anywhere."""
        return cls(np.zeros((vertices, 2), np.float32), np.zeros((1, 1), np.float32), np.zeros(vertices, np.float32))


def rasterize(points: np.ndarray, triangles: np.ndarray, width: int, height: int, cutout: Cutout) -> Coverage:
    """The nearest triangle at each pixel's centre.

    points: (V, 3) float32: x to the right and y down in pixels, z towards the viewer.
    triangles: (T, 3) int32; both of their sides count. The centre of a pixel is half a pixel from its corner.
    """
    triangle = np.full((height, width), NOTHING, np.int32)
    barycentric = np.zeros((height, width, 2), np.float32)
    depth = np.full((height, width), FAR, np.float32)
    _rasterize(points, triangles, cutout.coordinates, cutout.heights, cutout.thresholds, triangle, barycentric, depth)
    return Coverage(triangle, barycentric, depth)


def interpolate(coverage: Coverage, triangles: np.ndarray, attributes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The attributes of vertices, (V, C) float32, at covered pixels: (N, C) float32.

    triangles: (T, 3) int32. pixels: (N,) indices into the flat picture.
    """
    values = np.empty((len(pixels), attributes.shape[1]), np.float32)
    _interpolate(
        coverage.triangle.ravel()[pixels],
        coverage.barycentric.reshape(-1, 2)[pixels],
        triangles,
        attributes,
        values,
    )
    return values


def vertex_normals(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(V, 3) float32 of length 1, the mean of the adjacent triangles' normals weighted by area."""
    normals = np.zeros((len(points), 3), np.float32)
    _add_normals(points, triangles, normals)
    return normals


@njit(cache=True)
def _rasterize(points, triangles, coordinates, heights, thresholds, triangle, barycentric, depth):  # pragma: no cover
    rows, columns = triangle.shape
    map_rows, map_columns = heights.shape
    for index in range(triangles.shape[0]):
        a, b, c = triangles[index, 0], triangles[index, 1], triangles[index, 2]
        ax, ay = points[a, 0], points[a, 1]
        bx, by = points[b, 0], points[b, 1]
        cx, cy = points[c, 0], points[c, 1]
        left = max(0, math.ceil(min(ax, bx, cx) - 0.5))
        right = min(columns - 1, math.floor(max(ax, bx, cx) - 0.5))
        top = max(0, math.ceil(min(ay, by, cy) - 0.5))
        bottom = min(rows - 1, math.floor(max(ay, by, cy) - 0.5))
        if right < left or bottom < top:
            continue  # most triangles: they lie between the centres of pixels
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if abs(area) < _SMALLEST_AREA:
            continue
        inverse = 1 / area
        threshold = thresholds[a]
        for row in range(top, bottom + 1):
            y = row + 0.5
            for column in range(left, right + 1):
                x = column + 0.5
                second = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) * inverse
                third = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) * inverse
                if second < 0 or third < 0 or second + third > 1:
                    continue
                first = 1 - second - third
                z = first * points[a, 2] + second * points[b, 2] + third * points[c, 2]
                if z <= depth[row, column]:
                    continue
                if threshold != 0:
                    u = first * coordinates[a, 0] + second * coordinates[b, 0] + third * coordinates[c, 0]
                    v = first * coordinates[a, 1] + second * coordinates[b, 1] + third * coordinates[c, 1]
                    map_row, map_column = int(v), int(u)
                    if map_row < 0 or map_row >= map_rows or map_column < 0 or map_column >= map_columns:
                        continue
                    if heights[map_row, map_column] <= threshold:
                        continue
                depth[row, column] = z
                triangle[row, column] = index
                barycentric[row, column, 0] = second
                barycentric[row, column, 1] = third


@njit(cache=True)
def _interpolate(index, barycentric, triangles, attributes, values):  # pragma: no cover
    for pixel in range(index.shape[0]):
        a, b, c = triangles[index[pixel], 0], triangles[index[pixel], 1], triangles[index[pixel], 2]
        second, third = barycentric[pixel, 0], barycentric[pixel, 1]
        first = 1 - second - third
        for channel in range(attributes.shape[1]):
            values[pixel, channel] = (
                first * attributes[a, channel] + second * attributes[b, channel] + third * attributes[c, channel]
            )


@njit(cache=True)
def _add_normals(points, triangles, normals):  # pragma: no cover
    for index in range(triangles.shape[0]):
        a, b, c = triangles[index, 0], triangles[index, 1], triangles[index, 2]
        ux, uy, uz = (points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2])
        vx, vy, vz = (points[c, 0] - points[a, 0], points[c, 1] - points[a, 1], points[c, 2] - points[a, 2])
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for corner in (a, b, c):
            normals[corner, 0] += x
            normals[corner, 1] += y
            normals[corner, 2] += z
    for vertex in range(normals.shape[0]):
        length = math.sqrt(normals[vertex, 0] ** 2 + normals[vertex, 1] ** 2 + normals[vertex, 2] ** 2) + 1e-12
        for axis in range(3):
            normals[vertex, axis] /= length

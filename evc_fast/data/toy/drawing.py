"""A small rasteriser: antialiased shapes on a numpy picture, by their signed distance in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Color = tuple[float, float, float]
Point = tuple[float, float]

EDGE: Color = (0.12, 0.1, 0.12)  # outlines
_EDGE_WIDTH = 0.9  # pixels


class Pen:
    """Draws on `picture` in coordinates of its own: x to the right, y up, the origin and the unit given in pixels.

    picture: float32 [H, W, 3] in 0..1, changed in place
    origin: of the pen's coordinates, in pixels from the picture's upper left corner (x, y down)
    unit: pixels; angle: radians by which the pen's x axis is turned counter-clockwise
    """

    def __init__(self, picture: np.ndarray, origin: Point, unit: float = 1.0, angle: float = 0.0) -> None:
        self.picture = picture
        self.origin = origin
        self.unit = unit
        self.angle = angle
        self._cos, self._sin = math.cos(angle), math.sin(angle)

    def at(self, x: float, y: float, angle: float = 0.0) -> Pen:
        """A pen whose origin is this pen's (x, y), turned by `angle` more."""
        return Pen(self.picture, self.to_pixels(x, y), self.unit, self.angle + angle)

    def to_pixels(self, x: float, y: float) -> Point:
        return (
            self.origin[0] + self.unit * (x * self._cos - y * self._sin),
            self.origin[1] - self.unit * (x * self._sin + y * self._cos),
        )

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, *, angle: float = 0.0, edge: bool = False
    ) -> None:
        """A filled ellipse around (x, y), its half axes rx and ry, turned by `angle`."""
        cx, cy = self.to_pixels(x, y)
        rx, ry = max(rx * self.unit, 1e-3), max(ry * self.unit, 1e-3)
        reach = max(rx, ry) + 2
        box = self._box([(cx - reach, cy - reach), (cx + reach, cy + reach)])
        if box is None:
            return
        px, py = self._grid(box)
        px, py = px - cx, cy - py
        cos, sin = math.cos(self.angle + angle), math.sin(self.angle + angle)
        u, v = px * cos - py * sin, px * sin + py * cos
        radius = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
        slope = np.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2)
        self._fill(box, radius * (radius - 1) / np.maximum(slope, 1e-6), color, edge)

    def stroke(self, points: Sequence[Point], width: float, color: Color, *, edge: bool = False) -> None:
        """A line of round ends through `points`."""
        pixels = [self.to_pixels(*point) for point in points]
        half = width * self.unit / 2
        box = self._box(pixels, half + 2)
        if box is None:
            return
        px, py = self._grid(box)
        nearest = None
        for (ax, ay), (bx, by) in pairwise(pixels):
            dx, dy = bx - ax, by - ay
            along = np.clip(((px - ax) * dx + (py - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            squared = (px - ax - along * dx) ** 2 + (py - ay - along * dy) ** 2
            nearest = squared if nearest is None else np.minimum(nearest, squared)
        self._fill(box, np.sqrt(nearest) - half, color, edge)

    def polygon(self, points: Sequence[Point], color: Color, *, edge: bool = False) -> None:
        """A filled polygon without crossings."""
        pixels = [self.to_pixels(*point) for point in points]
        box = self._box(pixels, 2)
        if box is None:
            return
        px, py = self._grid(box)
        px, py = np.broadcast_arrays(px, py)
        nearest = np.full(px.shape, np.inf, np.float32)
        inside = np.zeros(px.shape, bool)
        for (ax, ay), (bx, by) in zip(pixels, [*pixels[1:], pixels[0]], strict=True):
            dx, dy = bx - ax, by - ay
            along = np.clip(((px - ax) * dx + (py - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            nearest = np.minimum(nearest, (px - ax - along * dx) ** 2 + (py - ay - along * dy) ** 2)
            if dy:  # the ray to the right crosses this side
                inside ^= ((ay > py) != (by > py)) & (px < ax + dx * (py - ay) / dy)
        distance = np.sqrt(nearest)
        self._fill(box, np.where(inside, -distance, distance), color, edge)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: Color, *, edge: bool = False) -> None:
        """A filled rectangle between two opposite corners."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, edge=edge)

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, color: Color
    ) -> None:
        """A line along an ellipse around (x, y), from angle `start` to `end` in radians."""
        angles = [start + (end - start) * i / 8 for i in range(9)]
        self.stroke([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], width, color)

    def heart(self, x: float, y: float, size: float, color: Color) -> None:
        """A heart of half-width `size` around (x, y)."""
        for side in (-1, 1):
            self.ellipse(x + side * 0.45 * size, y + 0.3 * size, 0.55 * size, 0.55 * size, color)
        self.polygon([(x - 0.95 * size, y + 0.1 * size), (x + 0.95 * size, y + 0.1 * size), (x, y - size)], color)

    def drop(self, x: float, y: float, size: float, color: Color) -> None:
        """A drop of half-width `size`, its tip above."""
        self.ellipse(x, y, size, size, color)
        self.polygon([(x - 0.85 * size, y + 0.5 * size), (x + 0.85 * size, y + 0.5 * size), (x, y + 2.4 * size)], color)

    def _box(self, pixels: Sequence[Point], margin: float = 0.0) -> tuple[int, int, int, int] | None:
        """Rows and columns that can be touched, or None outside the picture."""
        height, width = self.picture.shape[:2]
        xs, ys = [p[0] for p in pixels], [p[1] for p in pixels]
        left, right = max(0, math.floor(min(xs) - margin)), min(width, math.ceil(max(xs) + margin))
        top, bottom = max(0, math.floor(min(ys) - margin)), min(height, math.ceil(max(ys) + margin))
        return (top, bottom, left, right) if top < bottom and left < right else None

    @staticmethod
    def _grid(box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the box's pixels: x [1, w], y [h, 1]."""
        top, bottom, left, right = box
        return (
            np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5),
            np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5),
        )

    def _fill(self, box: tuple[int, int, int, int], distance: np.ndarray, color: Color, edge: bool) -> None:
        top, bottom, left, right = box
        part = self.picture[top:bottom, left:right]
        layers = [(_EDGE_WIDTH, EDGE), (0.0, color)] if edge else [(0.0, color)]
        for grown, paint in layers:
            coverage = np.clip(0.5 + grown - distance, 0, 1).astype(np.float32)[..., None]
            part += coverage * (np.asarray(paint, np.float32) - part)

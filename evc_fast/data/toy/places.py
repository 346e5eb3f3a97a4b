"""Where it happens: backgrounds whose colours say nothing of the emotion."""

from __future__ import annotations

import colorsys

import numpy as np

from evc_fast.data.toy.drawing import EDGE, Color, Pen
from evc_fast.data.toy.figures import mix, vivid

GROUND = 0.86  # height of the figure's feet, share of the picture from above


def _near(random: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.05) -> Color:
    """A colour around the one given, by hue, saturation and value in 0..1."""
    return colorsys.hsv_to_rgb(
        (hue + random.uniform(-spread, spread)) % 1.0,
        float(np.clip(saturation + random.uniform(-0.15, 0.15), 0, 1)),
        float(np.clip(value + random.uniform(-0.18, 0.18), 0, 1)),
    )


def _sky(pen: Pen, random: np.random.Generator) -> None:
    # By day, at dawn or at dusk.
    color = _near(random, 0.56, 0.35, 0.9) if random.uniform() < 0.6 else vivid(random, (0.1, 0.4), (0.5, 1.0))
    pen.rectangle(-1, -1, 97, 97, color)
    x, y = random.uniform(8, 88), random.uniform(80, 92)
    if random.uniform() < 0.5:
        pen.ellipse(x, y, 5, 5, _near(random, 0.14, 0.5, 0.95))
    else:
        for dx in (-5, 0, 5):
            pen.ellipse(x + dx, y, 5.5, 3.2, (0.97, 0.97, 0.98))


def _park(pen: Pen, random: np.random.Generator) -> None:
    _sky(pen, random)
    pen.rectangle(-1, -1, 97, random.uniform(30, 38), _near(random, 0.3, 0.55, 0.65, 0.07))
    for x in random.permutation([random.uniform(2, 30), random.uniform(66, 94)])[: random.integers(1, 3)]:
        base, crown = random.uniform(24, 32), _near(random, 0.33, 0.6, 0.5)
        pen.rectangle(x - 2, base, x + 2, base + 22, _near(random, 0.07, 0.5, 0.45))
        for dx, dy in ((-6, 24), (6, 24), (0, 32)):
            pen.ellipse(x + dx, base + dy, 9, 8, crown, edge=True)
    for _ in range(random.integers(3, 8)):
        pen.ellipse(random.uniform(2, 94), random.uniform(2, 24), 1.4, 1.4, vivid(random, (0.4, 0.8), (0.8, 1.0)))


def _street(pen: Pen, random: np.random.Generator) -> None:
    _sky(pen, random)
    left = -4.0
    while left < 96:
        width, top = random.uniform(16, 28), random.uniform(58, 88)
        wall = vivid(random, (0.1, 0.45), (0.4, 0.85))
        pen.rectangle(left, 20, left + width, top, wall, edge=True)
        light = _near(random, 0.14, 0.35, 0.85) if random.uniform() < 0.5 else mix(wall, EDGE, 0.5)
        for x in np.arange(left + 3, left + width - 4, 6.5):
            for y in np.arange(34, top - 5, 9):
                pen.rectangle(x, y, x + 3.5, y + 5, light)
        left += width
    pen.rectangle(-1, -1, 97, 26, _near(random, 0.6, 0.05, 0.62))
    pen.rectangle(-1, -1, 97, 8, _near(random, 0.6, 0.08, 0.32))
    start = random.uniform(-10, 0)
    for x in np.arange(start, 97, 18):
        pen.rectangle(x, 3, x + 9, 4.6, (0.95, 0.95, 0.9))


def _beach(pen: Pen, random: np.random.Generator) -> None:
    _sky(pen, random)
    horizon, shore = random.uniform(50, 58), random.uniform(30, 38)
    sea = _near(random, 0.53, 0.65, 0.7)
    pen.rectangle(-1, -1, 97, horizon, sea)
    for _ in range(5):
        x, y = random.uniform(0, 90), random.uniform(shore + 3, horizon - 2)
        pen.stroke([(x, y), (x + 4, y + 1), (x + 8, y)], 0.9, mix(sea, (1, 1, 1), 0.6))
    pen.rectangle(-1, -1, 97, shore, _near(random, 0.12, 0.35, 0.85))
    pen.stroke([(-1, shore), (97, shore)], 2.0, (0.96, 0.97, 0.97))
    x, color = random.choice([random.uniform(6, 24), random.uniform(72, 90)]), vivid(random, (0.5, 0.9), (0.7, 1.0))
    pen.stroke([(x, 24), (x, 62)], 1.8, (0.9, 0.88, 0.82), edge=True)
    pen.polygon([(x - 15, 55), (x - 8, 63), (x, 66), (x + 8, 63), (x + 15, 55)], color, edge=True)
    pen.polygon([(x - 5, 55), (x - 3, 64), (x, 66), (x + 3, 64), (x + 5, 55)], (0.97, 0.97, 0.97))


def _kitchen(pen: Pen, random: np.random.Generator) -> None:
    wall = vivid(random, (0.05, 0.35), (0.65, 0.98))
    pen.rectangle(-1, -1, 97, 97, wall)
    for line in np.arange(30, 97, 11):
        pen.stroke([(-1, line), (97, line)], 0.8, mix(wall, (1, 1, 1), 0.5))
        pen.stroke([(line - 29, 26), (line - 29, 97)], 0.8, mix(wall, (1, 1, 1), 0.5))
    floor = vivid(random, (0.05, 0.4), (0.4, 0.8))
    pen.rectangle(-1, -1, 97, 22, floor)
    for row, y in enumerate((0, 8, 15)):
        for x in range(-8 + 8 * (row % 2), 97, 16):
            pen.rectangle(x, y, x + 8, y + (8 if row == 0 else 7), mix(floor, (1, 1, 1), 0.45))
    unit = vivid(random, (0.1, 0.5), (0.45, 0.95))
    pen.rectangle(-1, 20, 97, 42, unit, edge=True)
    pen.rectangle(-1, 42, 97, 45, (0.35, 0.3, 0.28))
    for x in range(12, 97, 16):
        pen.stroke([(x, 21), (x, 42)], 0.8, EDGE)
        pen.ellipse(x - 3, 36, 0.9, 0.9, EDGE)
    x = float(random.choice([random.uniform(2, 8), random.uniform(68, 74)]))
    pen.rectangle(x, 20, x + 20, 78, (0.9, 0.92, 0.94), edge=True)
    pen.stroke([(x, 56), (x + 20, 56)], 1.0, EDGE)
    pen.stroke([(x + 16.5, 60), (x + 16.5, 70)], 1.2, (0.5, 0.5, 0.55))
    other = 78 - x
    pen.rectangle(other, 72, other + 16, 92, mix(unit, EDGE, 0.15), edge=True)
    pen.ellipse(other + 4, 49, 4.5, 4.0, vivid(random, (0.3, 0.8), (0.4, 0.9)), edge=True)


def _bedroom(pen: Pen, random: np.random.Generator) -> None:
    wall = vivid(random, (0.1, 0.4), (0.55, 0.95))
    pen.rectangle(-1, -1, 97, 97, wall)
    for x in np.arange(random.uniform(-6, 0), 97, 9):
        pen.stroke([(x, 20), (x, 97)], 2.2, mix(wall, (1, 1, 1), 0.25))
    pen.rectangle(-1, -1, 97, 26, _near(random, 0.08, 0.45, 0.55))
    pen.ellipse(48, 12, 40, 7, vivid(random, (0.3, 0.7), (0.4, 0.9)))
    side = 1 if random.uniform() < 0.5 else -1
    x, sheet = 48 - side * 30, vivid(random, (0.3, 0.8), (0.5, 0.95))
    pen.rectangle(x - 26, 20, x + 26, 32, sheet, edge=True)
    pen.rectangle(x - side * 22 - 3, 18, x - side * 22 + 3, 54, (0.5, 0.33, 0.2), edge=True)
    pen.ellipse(x - side * 12, 35, 8, 4.5, (0.96, 0.96, 0.98), edge=True)
    x = 48 + side * 28
    pen.rectangle(x - 11, 58, x + 11, 84, (0.9, 0.88, 0.84), edge=True)
    pen.rectangle(x - 9, 60, x + 9, 82, vivid(random, (0.1, 0.5), (0.2, 0.95)))
    pen.stroke([(x, 59), (x, 83)], 1.2, (0.9, 0.88, 0.84))
    pen.stroke([(x - 10, 71), (x + 10, 71)], 1.2, (0.9, 0.88, 0.84))


def _stage(pen: Pen, random: np.random.Generator) -> None:
    back = vivid(random, (0.2, 0.6), (0.15, 0.45))
    pen.rectangle(-1, -1, 97, 97, back)
    wood = _near(random, 0.08, 0.5, 0.6)
    pen.rectangle(-1, -1, 97, 26, wood)
    for x in range(-40, 140, 12):
        pen.stroke([(48 + 1.5 * (x - 48), -1), (48 + 0.8 * (x - 48), 26)], 0.8, mix(wood, EDGE, 0.4))
    x = random.uniform(30, 66)
    pen.polygon([(x - 4, 97), (x + 4, 97), (x + 26, 14), (x - 26, 14)], mix(back, (1, 1, 0.85), 0.35))
    pen.ellipse(x, 14, 27, 6, mix(wood, (1, 1, 0.9), 0.5))
    curtain = vivid(random, (0.5, 0.9), (0.4, 0.85))
    for side in (0, 1):
        for fold in range(3):
            left = fold * 5.5 if side == 0 else 96 - 5.5 * (fold + 1)
            shade = mix(curtain, EDGE, 0.3 * (fold % 2))
            pen.rectangle(left, 16, left + 5.5, 97, shade)
    pen.rectangle(-1, 88, 97, 97, curtain, edge=True)
    for x in range(0, 97, 12):
        pen.ellipse(x, 88, 6, 4, curtain, edge=True)


PLACES = {
    "park": _park,
    "street": _street,
    "beach": _beach,
    "kitchen": _kitchen,
    "bedroom": _bedroom,
    "stage": _stage,
}


def draw_place(place: str, random: np.random.Generator) -> np.ndarray:
    """A background: float32 [96, 96, 3] in 0..1."""
    picture = np.zeros((96, 96, 3), np.float32)
    PLACES[place](Pen(picture, (0.0, 96.0)), random)
    # Light and weather: one gain and one tint a clip.
    gain = random.uniform(0.75, 1.1) * (1 + random.uniform(-0.08, 0.08, 3))
    return np.clip(picture * gain.astype(np.float32), 0, 1)

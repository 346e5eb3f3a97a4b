"""Emotions as they show: in the face, in the posture and in the motion."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from evc_fast.data.toy.drawing import EDGE, Color, Pen

WHITE: Color = (0.97, 0.97, 0.95)
MOUTH: Color = (0.5, 0.1, 0.12)
TONGUE: Color = (0.92, 0.45, 0.5)
TEAR: Color = (0.35, 0.65, 0.98)
HEART: Color = (0.92, 0.12, 0.3)


@dataclass(frozen=True)
class Expression:
    """A face, its posture and its motion; lengths in units of the figure, whose head has a radius of about 14.

    Face: brow_slope > 0 raises the inner ends of the brows; brow_height above the eyes; eye the radius, lid the share
    that is closed, pupil the radius; look the direction of the pupils (x, y); smile in -1..1; mouth_open in 0..1;
    mouth_width; and what is there or not: shut ("", "up" or "down", the bow of closed eyes), teeth, tongue, tears,
    sweat, steam, hearts, blush.
    Posture: head_tilt and lean in radians, lean towards where the figure goes; head_drop; stoop lowers the hips; hands
    where free hands go, as (x, y) from the shoulder outwards and up.
    Motion: tempo of the action; bounce up and down, sway and shake of the head (radians), tremble, start (a sudden hop
    now and then), in units of the figure, and at what rate a second they swing.
    """

    brow_slope: float = 0.0
    brow_height: float = 5.0
    eye: float = 2.5
    lid: float = 0.15
    pupil: float = 1.5
    look: tuple[float, float] = (0.0, 0.0)
    smile: float = 0.1
    mouth_open: float = 0.0
    mouth_width: float = 3.6
    mouth_skew: float = 0.0
    shut: str = ""
    teeth: bool = False
    tongue: bool = False
    tears: bool = False
    sweat: bool = False
    steam: bool = False
    hearts: bool = False
    blush: bool = False
    head_tilt: float = 0.0
    lean: float = 0.0
    head_drop: float = 0.0
    stoop: float = 0.0
    hands: tuple[float, float] = (4.0, -13.0)
    tempo: float = 1.0
    bounce: float = 0.0
    sway: float = 0.0
    shake: float = 0.0
    tremble: float = 0.0
    start: float = 0.0
    rate: float = 1.0

    def at(self, strength: float) -> Expression:
        """This expression at `strength` 0..1 of itself: numbers go towards the neutral face, marks stay."""
        values = {}
        for field in fields(self):
            mine, neutral = getattr(self, field.name), getattr(NEUTRAL, field.name)
            if isinstance(mine, float):
                values[field.name] = neutral + strength * (mine - neutral)
            elif isinstance(mine, tuple):
                values[field.name] = tuple(n + strength * (m - n) for m, n in zip(mine, neutral, strict=True))
            else:
                values[field.name] = mine
        return Expression(**values)


NEUTRAL = Expression()

EXPRESSIONS: dict[str, Expression] = {
    "happy": Expression(
        shut="up", brow_height=6.5, smile=1.0, mouth_open=0.75, mouth_width=5.2, blush=True,
        head_tilt=0.08, lean=-0.04, hands=(9.0, 8.0), tempo=1.2, bounce=2.2, sway=0.1, rate=2.4,
    ),
    "sad": Expression(
        brow_slope=0.75, brow_height=5.2, lid=0.5, look=(0.0, -0.9), smile=-1.0, mouth_width=3.6, tears=True,
        head_tilt=0.14, head_drop=3.5, lean=0.1, stoop=2.0, hands=(1.5, -14.0), tempo=0.6,
    ),
    "angry": Expression(
        brow_slope=-0.85, brow_height=2.9, lid=0.35, pupil=1.3, smile=-0.5, mouth_open=0.45, mouth_width=5.0,
        teeth=True, steam=True, lean=0.2, head_drop=1.0, hands=(8.5, -7.0), tempo=1.3, shake=0.06, bounce=1.3, rate=4.0,
    ),
    "afraid": Expression(
        brow_slope=0.7, brow_height=7.4, eye=3.5, lid=0.0, pupil=0.8, smile=-0.8, mouth_open=0.35, mouth_width=4.2,
        sweat=True, lean=-0.12, stoop=3.0, hands=(7.0, 5.0), tempo=0.9, tremble=0.9, rate=6.0,
    ),
    "surprised": Expression(
        brow_height=8.6, eye=3.9, lid=0.0, pupil=1.3, smile=0.0, mouth_open=1.0, mouth_width=2.5,
        lean=-0.08, hands=(11.0, 1.0), tempo=0.9, start=6.0, rate=1.0,
    ),
    "disgusted": Expression(
        brow_slope=-0.45, brow_height=3.2, lid=0.6, look=(-0.9, 0.0), smile=-0.7, mouth_open=0.15, mouth_width=4.4,
        mouth_skew=0.35, tongue=True, head_tilt=-0.2, lean=-0.14, hands=(10.0, -3.0), tempo=0.85, shake=0.16, rate=1.4,
    ),
    "calm": Expression(
        shut="down", brow_height=5.4, smile=0.5, mouth_width=3.4, hands=(5.0, -12.0), tempo=0.65, sway=0.05, rate=0.4,
    ),
    "loving": Expression(
        brow_slope=0.25, brow_height=6.2, smile=0.9, mouth_width=4.2, hearts=True, blush=True,
        head_tilt=0.2, hands=(-3.5, -6.5), tempo=0.8, sway=0.14, rate=0.8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tremor:
    """What an emotion adds to the pose at one moment: shifts of the figure and a turn of its head (radians)."""

    dx: float
    dy: float
    head: float


def tremor(expression: Expression, seconds: float, phase: float) -> Tremor:
    """The emotion's own motion; `phase` in radians sets two clips of one emotion apart."""
    swing = 2 * math.pi * expression.rate * seconds + phase
    hop = max(0.0, math.sin(swing)) ** 8 * expression.start
    return Tremor(
        dx=expression.tremble * math.sin(2.7 * swing),
        dy=expression.bounce * abs(math.sin(swing)) + hop + 0.4 * expression.tremble * math.cos(3.9 * swing),
        head=expression.head_tilt + expression.sway * math.sin(swing) + expression.shake * math.sin(2 * swing),
    )


def draw_face(pen: Pen, expression: Expression, iris: Color, seconds: float, phase: float) -> None:
    """Eyes, brows and mouth on a head around the pen's origin; marks move with the time."""
    for side in (-1, 1):
        if expression.blush:
            pen.ellipse(side * 8.6, -3.6, 2.3, 1.5, (0.97, 0.5, 0.52))
        _draw_eye(pen, expression, side, iris)
        _draw_brow(pen, expression, side)
    _draw_mouth(pen, expression)
    _draw_marks(pen, expression, seconds, phase)


def _draw_eye(pen: Pen, expression: Expression, side: int, iris: Color) -> None:
    x, y = side * 5.4, 1.6
    if expression.shut:
        up = expression.shut == "up"
        start, end = (0.15 * math.pi, 0.85 * math.pi) if up else (1.15 * math.pi, 1.85 * math.pi)
        pen.arc(x, y - 1.2 if up else y + 1.0, 3.0, 2.8, start, end, 1.5, EDGE)
        return
    radius = expression.eye
    if expression.hearts:
        pen.heart(x, y + 0.3, 3.4, HEART)
        return
    pen.ellipse(x, y, radius, radius * 1.12, WHITE, edge=True)
    px, py = x + expression.look[0], y + expression.look[1]
    pen.ellipse(px, py, expression.pupil, expression.pupil, iris)
    pen.ellipse(px, py, 0.6 * expression.pupil, 0.6 * expression.pupil, EDGE)
    if expression.lid > 0.25:
        # The lid's lower rim follows the brow, the skin above it is covered by a thick line.
        rim = y + radius * 1.12 * (1 - 2 * expression.lid)
        slope = 0.35 * expression.brow_slope * side
        for lift in (0.0, 0.8, 1.6) if expression.lid > 0.4 else (0.0,):
            ends = [(x + d * (radius + 0.5), rim + lift - slope * d * radius) for d in (-1, 1)]
            pen.stroke(ends, 1.2, EDGE)


def _draw_brow(pen: Pen, expression: Expression, side: int) -> None:
    y, rise = 1.6 + expression.brow_height, 1.9 * expression.brow_slope
    middle = 0.8 if expression.brow_slope == 0 else 0.2
    points = [(side * 2.6, y + rise), (side * 5.4, y + middle), (side * 8.2, y - rise)]
    pen.stroke(points, 1.7, EDGE)


def _draw_mouth(pen: Pen, expression: Expression) -> None:
    width, y = expression.mouth_width, -6.6
    bend, skew = 2.4 * expression.smile, expression.mouth_skew * width
    steps = [-1 + i / 4 for i in range(9)]
    # A smile is a line whose corners rise; an open mouth is the space between two such lines.
    middle = [(width * t, y + bend * (t * t - 0.5) + skew * t) for t in steps]
    if expression.mouth_open < 0.1:
        pen.stroke(middle, 1.4, EDGE)
    else:
        depth = 4.6 * expression.mouth_open
        rounding = [math.sqrt(max(0.0, 1 - t * t)) for t in steps]
        flat = 0.15 if expression.smile > 0.4 else 0.75
        upper = [(px, py + flat * depth * r) for (px, py), r in zip(middle, rounding, strict=True)]
        lower = [(px, py - depth * r) for (px, py), r in zip(middle, rounding, strict=True)]
        pen.polygon([*upper, *lower[::-1]], WHITE if expression.teeth else MOUTH, edge=True)
        if expression.teeth:
            pen.stroke([middle[1], middle[4], middle[7]], 0.7, EDGE)
            for index in (2, 4, 6):
                pen.stroke([upper[index], lower[index]], 0.7, EDGE)
    if expression.tongue:
        pen.ellipse(1.2, y - 2.6, 1.7, 2.7, TONGUE, edge=True)


def _draw_marks(pen: Pen, expression: Expression, seconds: float, phase: float) -> None:
    turn = seconds * 0.9 + phase / (2 * math.pi)
    if expression.tears:
        for side, shift in ((-1, 0.0), (1, 0.45)):
            fall = (turn + shift) % 1.0
            pen.drop(side * 6.6, -1.5 - 9.0 * fall, 1.5, TEAR)
    if expression.sweat:
        for side, shift in ((-1, 0.5), (1, 0.0)):
            fall = (1.5 * turn + shift) % 1.0
            pen.drop(side * (12.0 + 3.0 * fall), 9.0 - 5.0 * fall, 1.3, TEAR)
    if expression.steam:
        for side in (-1, 1):
            puff = (2.0 * turn + 0.25 * side) % 1.0
            size = 1.2 + 2.0 * puff
            pen.ellipse(side * (14.5 + 5.0 * puff), 5.0 + 4.0 * puff, size, size, (0.9, 0.9, 0.9), edge=True)
    if expression.hearts:
        for side, shift in ((-1, 0.0), (1, 0.5)):
            rise = (turn + shift) % 1.0
            pen.heart(side * (13.0 + 2.0 * math.sin(6.0 * rise)), 6.0 + 10.0 * rise, 1.4 + 1.2 * (1 - rise), HEART)

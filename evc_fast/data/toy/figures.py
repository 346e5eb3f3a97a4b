"""The people and animals: how a subject looks, and how it is drawn in a pose with an expression."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from evc_fast.data.toy.actions import REACH, Pose
from evc_fast.data.toy.drawing import EDGE, Color, Pen, Point
from evc_fast.data.toy.faces import Expression, Tremor, draw_face

PEOPLE = ("man", "woman", "boy", "girl")
ANIMALS = ("dog", "cat", "rabbit", "bear")
SUBJECTS = (*PEOPLE, *ANIMALS)
_CHILDREN = ("boy", "girl")
_PINK: Color = (0.95, 0.66, 0.68)

_SKINS: tuple[Color, ...] = ((0.98, 0.85, 0.73), (0.93, 0.75, 0.6), (0.78, 0.57, 0.42), (0.6, 0.41, 0.29))
_HAIRS: tuple[Color, ...] = (
    (0.16, 0.12, 0.1),
    (0.4, 0.24, 0.12),
    (0.85, 0.66, 0.3),
    (0.62, 0.3, 0.12),
    (0.6, 0.6, 0.6),
)
_FURS: tuple[Color, ...] = (
    (0.72, 0.5, 0.3),
    (0.9, 0.87, 0.82),
    (0.62, 0.62, 0.64),
    (0.86, 0.62, 0.34),
    (0.5, 0.36, 0.27),
)


@dataclass(frozen=True)
class Look:
    """What one clip's figure looks like, drawn independently of what it does and feels."""

    subject: str
    skin: Color
    hair: Color
    top: Color
    bottom: Color
    prop: Color
    iris: Color

    @classmethod
    def draw(cls, subject: str, random: np.random.Generator) -> Look:
        """A look of `subject` at random."""

        def pick(colors: tuple[Color, ...]) -> Color:
            color = np.array(colors[random.integers(len(colors))]) + random.uniform(-0.04, 0.04, 3)
            return tuple(np.clip(color, 0, 1).tolist())

        def cloth() -> Color:
            return vivid(random, (0.35, 0.9), (0.45, 0.95))

        return cls(
            subject=subject,
            skin=pick(_SKINS if subject in PEOPLE else _FURS),
            hair=pick(_HAIRS),
            top=cloth(),
            bottom=cloth(),
            prop=cloth(),
            iris=vivid(random, (0.4, 0.7), (0.3, 0.6)),
        )


def vivid(random: np.random.Generator, saturation: Point, value: Point) -> Color:
    """A colour of any hue."""
    return colorsys.hsv_to_rgb(random.uniform(), random.uniform(*saturation), random.uniform(*value))


def mix(first: Color, second: Color, share: float) -> Color:
    """`share` of the second colour in the first."""
    return tuple(a + share * (b - a) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class Skeleton:
    """Where the parts of a figure are, in units from its spot on the ground: x to the right, y up."""

    hip: Point
    shoulder: Point
    head: Point
    feet: tuple[Point, Point]
    hands: tuple[Point, Point]


def place_joints(subject: str, pose: Pose, expression: Expression, shift: Tremor, facing: int) -> Skeleton:
    """The skeleton of a figure in a pose; `facing` is 1 to the right, else -1."""
    leg, torso = (11.5, 12.5) if subject in _CHILDREN else (15.0, 15.0)
    hip_height = leg + pose.hop - expression.stoop if pose.seat is None else pose.seat
    hip = (facing * pose.sway + shift.dx, hip_height + shift.dy)
    lean = facing * (pose.lean + expression.lean)
    shoulder = (hip[0] + torso * math.sin(lean), hip[1] + torso * math.cos(lean))
    head = (shoulder[0] + 9.0 * math.sin(lean), shoulder[1] + 11.0 - expression.head_drop)
    # A foot in the air follows the hips.
    back, front = (
        (facing * x + (hip[0] if y > 0.5 else 0.0), y + (shift.dy if pose.hop else 0.0)) for x, y in pose.feet
    )
    return Skeleton(hip, shoulder, head, (back, front), _place_hands(pose, expression, shoulder, facing))


def draw_figure(
    pen: Pen,
    look: Look,
    action: str,
    pose: Pose,
    expression: Expression,
    shift: Tremor,
    *,
    facing: int,
    seconds: float,
    phase: float,
) -> None:
    """The figure with what it uses; the pen's origin is its spot on the ground."""
    body = place_joints(look.subject, pose, expression, shift, facing)
    joints = [(body.shoulder[0] + side * 5.0 * facing, body.shoulder[1] - 2.0) for side in (-1, 1)]
    sleeve = look.top if look.subject in PEOPLE else look.skin
    _draw_behind(pen, look, action, pose, facing)
    _draw_tail(pen, look, body.hip, facing, expression, seconds, phase)
    back_hand = _draw_arm(pen, joints[0], body.hands[0], mix(sleeve, EDGE, 0.15), -facing)
    _draw_legs(pen, look, body.hip, body.feet, facing)
    _draw_torso(pen, look, body.hip, body.shoulder)
    front_hand = _draw_arm(pen, joints[1], body.hands[1], sleeve, facing)
    # Arms behind the head, hands before it: nothing hides the face.
    _draw_head(pen.at(*body.head, angle=facing * shift.head), look, expression, seconds, phase)
    hands = (back_hand, front_hand)
    _draw_prop(pen, look, action, pose, hands, facing)
    for hand in hands:
        pen.ellipse(*hand, 2.3, 2.3, look.skin, edge=True)


def _place_hands(pose: Pose, expression: Expression, shoulder: Point, facing: int) -> tuple[Point, Point]:
    hands = []
    for index, side in ((0, -1), (1, 1)):
        out, up = expression.hands
        free = (side * (5.0 + out), up)
        grip, (x, y) = pose.grips[index], pose.hands[index]
        x, y = free[0] + grip * (x - free[0]), free[1] + grip * (y - free[1])
        hands.append((shoulder[0] + facing * x, shoulder[1] + y))
    return hands[0], hands[1]


def _bend(start: Point, end: Point, reach: float, out: Point) -> list[Point]:
    """Start, joint and end of a limb of two equal parts; the joint is on the side that `out` points to."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    distance = max(math.hypot(dx, dy), 1e-3)
    if distance > reach:
        return [start, (start[0] + dx * reach / distance, start[1] + dy * reach / distance)]
    height = math.sqrt((reach / 2) ** 2 - (distance / 2) ** 2)
    if out[0] * dy - out[1] * dx > 0:
        height = -height
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    return [start, (middle[0] - height * dy / distance, middle[1] + height * dx / distance), end]


def _draw_arm(pen: Pen, joint: Point, hand: Point, color: Color, side: int) -> Point:
    """Draws the arm and returns where its hand has come to."""
    points = _bend(joint, hand, REACH, (side, -0.6))
    pen.stroke(points, 4.0, color, edge=True)
    return points[-1]


def _draw_legs(pen: Pen, look: Look, hip: Point, feet: tuple[Point, Point], facing: int) -> None:
    person = look.subject in PEOPLE
    cloth = look.bottom if look.subject in ("man", "boy") else look.skin
    for index, foot in enumerate(feet):
        color = mix(cloth, EDGE, 0.15) if index == 0 else cloth
        start = (hip[0] + (2.8 if index else -2.8) * facing, hip[1])
        ankle = (foot[0], foot[1] + 2.0)
        points = _bend(start, ankle, max(13.0, math.dist(start, ankle)), (facing, 0.3))
        if look.subject == "boy":
            pen.stroke(points, 4.4, mix(look.skin, EDGE, 0.15 * (1 - index)), edge=True)
            knee = tuple(start[i] + 0.5 * (points[1][i] - start[i]) for i in (0, 1))
            pen.stroke([start, knee], 5.4, color, edge=True)
        else:
            pen.stroke(points, 4.8, color, edge=True)
        shoe = EDGE if person else look.skin
        pen.ellipse(
            points[-1][0] + 1.6 * facing, points[-1][1] - 0.4, 3.8, 2.1, mix(shoe, (0.3, 0.25, 0.25), 0.3), edge=True
        )


def _draw_torso(pen: Pen, look: Look, hip: Point, shoulder: Point) -> None:
    (hx, hy), (sx, sy) = hip, shoulder
    if look.subject in ("woman", "girl"):
        long = 7.5 if look.subject == "woman" else 3.5
        hem = hy - long
        dress = [
            (sx - 5.0, sy),
            (sx + 5.0, sy),
            (hx + 5.0, hy + 3.0),
            (hx + 9.5, hem),
            (hx - 9.5, hem),
            (hx - 5.0, hy + 3.0),
        ]
        pen.polygon(dress, look.top, edge=True)
        pen.stroke([(hx - 5.0, hy + 3.2), (hx + 5.0, hy + 3.2)], 1.6, look.bottom)
        return
    if look.subject in ("man", "boy"):
        wide = 7.0 if look.subject == "man" else 5.5
        pen.polygon([(sx - wide, sy), (sx + wide, sy), (hx + 5.5, hy - 2.0), (hx - 5.5, hy - 2.0)], look.top, edge=True)
        if look.subject == "man":
            pen.polygon(
                [(sx - 1.2, sy), (sx + 1.2, sy), (sx + 1.6, sy - 9.0), (sx, sy - 11.0), (sx - 1.6, sy - 9.0)],
                look.bottom,
            )
        return
    middle, long = ((hx + sx) / 2, (hy + sy) / 2 - 0.5), math.dist(hip, shoulder) / 2 + 3.0
    wide = 10.0 if look.subject == "bear" else 7.5
    angle = math.atan2(hx - sx, sy - hy)
    pen.ellipse(*middle, wide, long, look.skin, angle=angle, edge=True)
    pen.ellipse(middle[0], middle[1] - 1.5, 0.6 * wide, 0.65 * long, mix(look.skin, (1, 1, 1), 0.45), angle=angle)
    if look.subject in ("dog", "cat"):
        pen.stroke([(sx - 6.0, sy - 2.0), (sx, sy - 3.5), (sx + 6.0, sy - 2.0)], 2.4, look.top, edge=True)


def _draw_tail(
    pen: Pen, look: Look, hip: Point, facing: int, expression: Expression, seconds: float, phase: float
) -> None:
    hx, hy = hip
    wag = math.sin(2 * math.pi * (0.6 + expression.rate) * seconds + phase) * (1.5 + expression.bounce)
    rise = 8.0 + 5.0 * expression.smile - 2.0 * expression.stoop
    if look.subject == "dog":
        pen.stroke(
            [(hx - 5 * facing, hy), (hx - 12 * facing, hy + 0.5 * rise), (hx - (14 + wag) * facing, hy + rise)],
            3.4,
            look.skin,
            edge=True,
        )
    elif look.subject == "cat":
        tip = [
            (hx - 5 * facing, hy),
            (hx - 12 * facing, hy - 2),
            (hx - (15 + wag) * facing, hy + 0.6 * rise),
            (hx - (12 + wag) * facing, hy + rise + 4),
        ]
        pen.stroke(tip, 2.6, look.skin, edge=True)
    elif look.subject == "rabbit":
        pen.ellipse(hx - 8 * facing, hy + 1.0, 3.2, 3.2, mix(look.skin, (1, 1, 1), 0.6), edge=True)


def _draw_head(pen: Pen, look: Look, expression: Expression, seconds: float, phase: float) -> None:
    droop = max(0.0, -expression.smile)
    _DRAW_BEHIND_HEAD[look.subject](pen, look, droop)
    if look.subject == "man":  # a beard along the jaw
        pen.ellipse(0, 0, 14.0, 13.2, look.hair, edge=True)
        pen.ellipse(0, 2.6, 12.4, 11.2, look.skin)
    else:
        pen.ellipse(0, 0, 14.0, 13.0, look.skin, edge=True)
    _DRAW_ON_HEAD[look.subject](pen, look, droop)
    draw_face(pen, expression, look.iris, seconds, phase)


def _nothing(pen: Pen, look: Look, droop: float) -> None:
    """This subject has nothing there."""


def _hair_cap(pen: Pen, look: Look, low: float) -> None:
    rim = [(13.6 * math.cos(a), 13.4 * math.sin(a)) for a in [math.pi * i / 12 for i in range(13)]]
    pen.polygon([(14.2, low), *rim, (-14.2, low), (-11.0, 8.0), (0.0, 10.4), (11.0, 8.0)], look.hair, edge=True)


def _behind_woman(pen: Pen, look: Look, droop: float) -> None:
    pen.polygon([(-13, 6), (13, 6), (17, -15), (10, -18), (-10, -18), (-17, -15)], look.hair, edge=True)
    pen.ellipse(0, 3.0, 16.0, 13.5, look.hair, edge=True)


def _behind_girl(pen: Pen, look: Look, droop: float) -> None:
    for side in (-1, 1):
        pen.ellipse(side * 17.5, 3.0 - 3.0 * droop, 4.2, 7.0, look.hair, angle=side * 0.5, edge=True)
        pen.ellipse(side * 13.6, 8.0, 2.5, 2.5, look.bottom, edge=True)


def _on_man(pen: Pen, look: Look, droop: float) -> None:
    _hair_cap(pen, look, 1.0)


def _on_woman(pen: Pen, look: Look, droop: float) -> None:
    _hair_cap(pen, look, -3.0)


def _on_girl(pen: Pen, look: Look, droop: float) -> None:
    _hair_cap(pen, look, 3.0)


def _on_boy(pen: Pen, look: Look, droop: float) -> None:
    rim = [
        (14.0 * math.cos(a), 1.5 + 13.0 * math.sin(a)) for a in [math.pi * (0.17 + 0.66 * i / 10) for i in range(11)]
    ]
    pen.polygon(rim, look.prop, edge=True)
    pen.stroke([(-12.0, 9.4), (0.0, 10.6), (12.0, 9.4)], 2.6, mix(look.prop, EDGE, 0.35), edge=True)


def _muzzle(pen: Pen, look: Look, nose: float) -> None:
    pen.ellipse(0, -5.4, 8.0, 6.4, mix(look.skin, (1, 1, 1), 0.55))
    pen.ellipse(0, -1.8, nose, 0.75 * nose, EDGE)


def _on_dog(pen: Pen, look: Look, droop: float) -> None:
    for side in (-1, 1):
        pen.ellipse(
            side * (14.0 - droop),
            1.0 - 2.0 * droop,
            4.2,
            10.0,
            mix(look.skin, EDGE, 0.45),
            angle=side * 0.18,
            edge=True,
        )
    _muzzle(pen, look, 2.4)


def _behind_cat(pen: Pen, look: Look, droop: float) -> None:
    for side in (-1, 1):
        tip = (side * (12.0 + 3.0 * droop), 20.0 - 4.0 * droop)
        pen.polygon([(side * 2.5, 10.0), tip, (side * 13.5, 4.0)], look.skin, edge=True)
        pen.polygon([(side * 5.5, 10.5), (tip[0] - side * 0.8, tip[1] - 3.0), (side * 11.5, 7.0)], _PINK)


def _on_cat(pen: Pen, look: Look, droop: float) -> None:
    pen.polygon([(-1.8, -1.2), (1.8, -1.2), (0, -3.2)], (0.85, 0.4, 0.45))
    for side in (-1, 1):
        for rise in (-1.5, 1.0):
            pen.stroke([(side * 8.5, -4.6 + 0.3 * rise), (side * 18.0, -4.6 + 2.0 * rise)], 0.7, EDGE)
    for x in (-3.0, 0.0, 3.0):
        pen.stroke([(x, 12.4), (0.8 * x, 9.6)], 1.1, mix(look.skin, EDGE, 0.5))


def _behind_rabbit(pen: Pen, look: Look, droop: float) -> None:
    for side in (-1, 1):
        ear = pen.at(side * 5.5, 10.0, angle=-side * (0.12 + 0.5 * droop))
        ear.ellipse(0, 9.0, 3.9, 11.0, look.skin, edge=True)
        ear.ellipse(0, 9.0, 1.9, 8.0, _PINK)


def _on_rabbit(pen: Pen, look: Look, droop: float) -> None:
    pen.ellipse(0, -2.2, 1.6, 1.2, (0.85, 0.4, 0.45))


def _behind_bear(pen: Pen, look: Look, droop: float) -> None:
    for side in (-1, 1):
        pen.ellipse(side * 11.0, 10.0 - droop, 5.0, 5.0, look.skin, edge=True)
        pen.ellipse(side * 11.0, 10.0 - droop, 2.6, 2.6, mix(look.skin, EDGE, 0.4))


def _on_bear(pen: Pen, look: Look, droop: float) -> None:
    _muzzle(pen, look, 3.2)


_DRAW_BEHIND_HEAD = {
    "man": _nothing,
    "woman": _behind_woman,
    "boy": _nothing,
    "girl": _behind_girl,
    "dog": _nothing,
    "cat": _behind_cat,
    "rabbit": _behind_rabbit,
    "bear": _behind_bear,
}
_DRAW_ON_HEAD = {
    "man": _on_man,
    "woman": _on_woman,
    "boy": _on_boy,
    "girl": _on_girl,
    "dog": _on_dog,
    "cat": _on_cat,
    "rabbit": _on_rabbit,
    "bear": _on_bear,
}


def _draw_behind(pen: Pen, look: Look, action: str, pose: Pose, facing: int) -> None:
    wood: Color = (0.55, 0.36, 0.2)
    if action == "sit":
        pen.stroke([(-7.0 * facing, 0), (-7.0 * facing, 26.0)], 2.2, wood, edge=True)
        pen.rectangle(-8.5 * facing, 14.0, -5.5 * facing, 26.0, look.prop, edge=True)
        pen.stroke([(6.0 * facing, 0), (6.0 * facing, 7.0)], 2.2, wood, edge=True)
        pen.rectangle(-8.0, 6.0, 8.0, 9.0, look.prop, edge=True)
    elif action == "ride":
        pen.stroke([(13.0 * facing, 2.5), (11.0 * facing, 25.0)], 2.0, (0.6, 0.62, 0.66), edge=True)
        pen.stroke([(8.0 * facing, 25.5), (14.0 * facing, 25.0)], 2.2, EDGE)
        pen.stroke([(-12.0 * facing, 3.0), (13.0 * facing, 3.0)], 2.6, look.prop, edge=True)
        for x in (-12.0, 13.0):
            wheel = pen.at(x * facing, 1.0, angle=-6.0 * pose.turn * facing)
            wheel.ellipse(0, 0, 3.6, 3.6, (0.2, 0.2, 0.22), edge=True)
            wheel.stroke([(-2.4, 0), (2.4, 0)], 1.0, (0.9, 0.9, 0.9))


def _draw_prop(pen: Pen, look: Look, action: str, pose: Pose, hands: tuple[Point, Point], facing: int) -> None:
    hand = hands[1]
    if action == "kick":
        ball = pen.at(facing * pose.prop[0], pose.prop[1], angle=-0.5 * pose.prop[0] * facing)
        ball.ellipse(0, 0, 4.4, 4.4, (0.96, 0.96, 0.96), edge=True)
        ball.ellipse(0, 0, 1.7, 1.7, look.prop)
        for turn in range(3):
            ball.ellipse(3.2 * math.cos(2.1 * turn), 3.2 * math.sin(2.1 * turn), 0.9, 0.9, look.prop)
    elif action == "wave":
        flag = pen.at(*hand, angle=-facing * (0.35 + 0.6 * pose.turn))
        flag.stroke([(0, -5.0), (0, 19.0)], 1.6, (0.6, 0.45, 0.25), edge=True)
        wind = 1.6 * pose.turn
        cloth = [
            (0, 19),
            (6 * facing, 18 + wind),
            (13 * facing, 19 - wind),
            (13 * facing, 11 - wind),
            (6 * facing, 10 + wind),
            (0, 11),
        ]
        flag.polygon(cloth, look.prop, edge=True)
    elif action == "read":
        x, y = (hands[0][0] + hands[1][0]) / 2, (hands[0][1] + hands[1][1]) / 2 + 2.0
        for side in (-1, 1):
            pen.polygon(
                [(x, y - 5.0), (x + side * 9.0, y - 3.8), (x + side * 9.0, y + 4.0), (x, y + 2.6)], look.prop, edge=True
            )
            pen.polygon(
                [(x, y + 2.6), (x + side * 9.0, y + 4.0), (x + side * 8.0, y + 5.4), (x, y + 4.2)],
                (0.97, 0.97, 0.93),
                edge=True,
            )
        if pose.turn > 0.75:  # a page goes over
            over = math.cos(4 * math.pi * (pose.turn - 0.75))
            pen.stroke([(x, y + 4.0), (x + 7.0 * over, y + 7.5)], 1.0, (0.97, 0.97, 0.93), edge=True)
    elif action == "eat":
        x, y = hand[0], hand[1] + 3.4
        pen.ellipse(x, y, 3.9, 3.7, (0.85, 0.15, 0.15), edge=True)
        pen.stroke([(x, y + 3.0), (x + 0.8, y + 5.4)], 1.0, (0.35, 0.22, 0.1))
        pen.ellipse(x + 2.2, y + 5.0, 1.7, 0.9, (0.3, 0.65, 0.2))
        if pose.turn > 0.5:
            pen.ellipse(x - 3.2 * facing, y + 0.8, 1.5, 1.5, (0.98, 0.93, 0.75))

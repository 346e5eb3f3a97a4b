"""What the figures do: a pose for every action and moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from evc_fast.data.toy.drawing import Point

REACH = 15.0  # of an arm, units of the figure


@dataclass(frozen=True)
class Pose:
    """A figure at one moment, x along its direction; index 0 is its back hand or foot, 1 its front one.

    hop: height of the hips above where they stand; seat: height of the hips where it sits, else None
    sway: shift of the body against the feet; lean: radians forward
    feet: (x from the figure's spot, y above the ground)
    hands: (x, y) from the shoulder; grips: 0..1, how far the action commands each hand, the emotion having the rest
    prop: position of the thing in use, from the figure's spot on the ground; turn: its angle or its progress in 0..1
    """

    feet: tuple[Point, Point]
    hop: float = 0.0
    seat: float | None = None
    sway: float = 0.0
    lean: float = 0.0
    hands: tuple[Point, Point] = ((-4.0, -13.0), (4.0, -13.0))
    grips: tuple[float, float] = (0.0, 0.0)
    prop: Point = (0.0, 0.0)
    turn: float = 0.0


def _sin(cycles: float) -> float:
    return math.sin(2 * math.pi * cycles)


def _stride(cycles: float, length: float, lift: float) -> tuple[Point, Point]:
    back, front = (
        (length * _sin(cycles + shift), lift * max(0.0, _sin(cycles + shift + 0.25))) for shift in (0.0, 0.5)
    )
    return back, front


_STAND = ((-3.6, 0.0), (3.6, 0.0))


def _walk(cycles: float) -> Pose:
    swing = 6.0 * _sin(cycles)
    return Pose(
        feet=_stride(cycles, 7.0, 3.0),
        hop=0.8 * abs(_sin(cycles)),
        hands=((-swing, -13.0), (swing, -13.0)),
        grips=(0.35, 0.35),
    )


def _run(cycles: float) -> Pose:
    swing = 9.0 * _sin(cycles)
    return Pose(
        feet=_stride(cycles, 12.0, 8.0),
        hop=3.0 * abs(_sin(cycles)),
        lean=0.2,
        hands=((-swing, -6.0), (swing, -6.0)),
        grips=(0.6, 0.6),
    )


def _jump(cycles: float) -> Pose:
    height = max(0.0, _sin(cycles)) * 15.0
    tuck = height / 15.0
    feet = ((-4.0 - 3.0 * tuck, height + 4.0 * tuck), (4.0 + 3.0 * tuck, height + 4.0 * tuck))
    lift = -11.0 + 22.0 * tuck
    return Pose(feet=feet, hop=height - 3.0 * (1 - tuck), hands=((-9.0, lift), (9.0, lift)), grips=(0.5, 0.5))


def _dance(cycles: float) -> Pose:
    swing = _sin(cycles)
    feet = ((-5.0, 6.0 * max(0.0, swing)), (5.0, 6.0 * max(0.0, -swing)))
    hands = ((-8.0, 3.0 + 10.0 * swing), (8.0, 3.0 - 10.0 * swing))
    return Pose(feet=feet, sway=5.0 * swing, lean=0.12 * swing, hop=abs(swing), hands=hands, grips=(0.75, 0.75))


def _wave(cycles: float) -> Pose:
    swing = _sin(cycles)
    return Pose(feet=_STAND, hands=((-4.0, -13.0), (12.0, 5.0 + 2.0 * swing)), grips=(0.0, 1.0), turn=0.6 * swing)


def _sit(cycles: float) -> Pose:
    feet = ((7.0 + 2.0 * _sin(cycles), 0.0), (10.0 - 2.0 * _sin(cycles), 0.0))
    return Pose(feet=feet, seat=10.0, hands=((3.0, -10.0), (8.0, -10.0)), grips=(0.3, 0.3))


def _kick(cycles: float) -> Pose:
    beat = cycles % 1.0
    swing = _sin(beat)  # back in the second half, forward in the first
    foot = (3.0 + 10.0 * swing, 6.0 * max(0.0, swing) + 2.0 * max(0.0, -swing))
    flight = max(0.0, min(1.0, (beat - 0.12) / 0.6))
    there = math.sin(math.pi * flight)  # out and back again
    return Pose(feet=((-3.0, 0.0), foot), lean=-0.1 * swing, prop=(13.0 + 22.0 * there, 4.0 + 12.0 * there**2))


def _read(cycles: float) -> Pose:
    nod = 0.8 * _sin(cycles)
    return Pose(feet=_STAND, hands=((-7.0, -8.0 + nod), (7.0, -8.0 + nod)), grips=(1.0, 1.0), turn=(0.5 * cycles) % 1.0)


def _eat(cycles: float) -> Pose:
    near = 0.5 + 0.5 * _sin(cycles)
    return Pose(feet=_STAND, hands=((-4.0, -13.0), (12.5 - 2.5 * near, -4.0 + 7.0 * near)), grips=(0.0, 1.0), turn=near)


def _ride(cycles: float) -> Pose:
    push = 8.0 * _sin(cycles)
    feet = ((-4.0 - push, 1.0 + 3.0 * max(0.0, _sin(cycles + 0.25))), (2.0, 4.0))
    return Pose(feet=feet, hop=3.0, lean=0.08, hands=((12.0, -9.0), (13.0, -9.0)), grips=(0.8, 1.0), turn=cycles)


@dataclass(frozen=True)
class Action:
    """pose: of cycles since the start; rate: cycles a second; travel: units of the figure a second."""

    pose: Callable[[float], Pose]
    rate: float
    travel: float = 0.0


ACTIONS: dict[str, Action] = {
    "walk": Action(_walk, 1.1, 12.0),
    "run": Action(_run, 1.9, 22.0),
    "jump": Action(_jump, 1.0),
    "dance": Action(_dance, 1.1),
    "wave": Action(_wave, 1.3),
    "sit": Action(_sit, 0.6),
    "kick": Action(_kick, 0.9),
    "read": Action(_read, 0.7),
    "eat": Action(_eat, 0.9),
    "ride": Action(_ride, 0.9, 24.0),
}

"""A clip of the toy world: what it shows, and its frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evc_fast.data.toy.actions import ACTIONS, Pose
from evc_fast.data.toy.drawing import Pen, Point
from evc_fast.data.toy.faces import EXPRESSIONS, Expression, Tremor, tremor
from evc_fast.data.toy.figures import Look, draw_figure, place_joints
from evc_fast.data.toy.places import GROUND, draw_place

SIZE = 96  # pixels
FRAMES = 24
FPS = 12

_COLORS, _CAPTIONS, _MOTION = range(3)  # what a clip draws random numbers for


@dataclass(frozen=True)
class Scene:
    """What one clip shows. `seed` settles all the rest: colours, sizes, positions, phases and captions."""

    video_id: str
    split: str
    subject: str
    action: str
    emotion: str
    place: str
    seed: tuple[int, int]

    def caption_random(self) -> np.random.Generator:
        """A generator for the choice of captions."""
        return self.random(_CAPTIONS)

    def random(self, purpose: int) -> np.random.Generator:
        """A generator of the clip's own for one purpose, so that captions do not shift when drawing changes."""
        return np.random.default_rng((*self.seed, purpose))


@dataclass(frozen=True)
class _Moment:
    """The figure at one frame: the pixel that it stands on, the pixels of its unit, and what `draw_figure` takes."""

    spot: Point
    unit: float
    facing: int
    seconds: float
    phase: float
    pose: Pose
    expression: Expression
    shift: Tremor


def _moments(scene: Scene, num_frames: int) -> Iterator[_Moment]:
    random = scene.random(_MOTION)
    action, expression = ACTIONS[scene.action], EXPRESSIONS[scene.emotion]
    facing = 1 if random.uniform() < 0.5 else -1
    unit = random.uniform(0.9, 1.15)
    tempo = expression.tempo * random.uniform(0.88, 1.12)
    start, phase = random.uniform(), random.uniform(0, 2 * math.pi)
    # How strongly the emotion shows: it swells and fades, and one moment of it is weaker than the clip.
    swell, depth = random.uniform(0, 2 * math.pi), random.uniform(0.1, 0.4)
    way = facing * action.travel * tempo * num_frames / FPS
    room = max(0.0, 28.0 - abs(way) * 0.5)
    middle = SIZE / 2 + random.uniform(-room, room)
    ground = SIZE * GROUND + random.uniform(-4.0, 6.0)
    for index in range(num_frames):
        seconds = index / FPS
        shown = expression.at(1 - depth * (0.5 + 0.5 * math.sin(2.2 * seconds + swell)))
        yield _Moment(
            spot=(middle + way * (index / max(1, num_frames - 1) - 0.5), ground),
            unit=unit,
            facing=facing,
            seconds=seconds,
            phase=phase,
            pose=action.pose(start + tempo * action.rate * seconds),
            expression=shown,
            shift=tremor(shown, seconds, phase),
        )


def draw_scene(scene: Scene, num_frames: int = FRAMES, *, only: Sequence[int] | None = None) -> np.ndarray:
    """The frames of a clip: uint8 [num_frames, 96, 96, 3]; of them those with the numbers `only`, in this order."""
    numbers = range(num_frames) if only is None else only
    random = scene.random(_COLORS)
    background = draw_place(scene.place, random)
    look = Look.draw(scene.subject, random)
    frames = np.empty((len(numbers), SIZE, SIZE, 3), np.uint8)
    moments = list(_moments(scene, num_frames))
    for index, moment in enumerate(moments[number] for number in numbers):
        picture = background.copy()
        pen = Pen(picture, moment.spot, moment.unit)
        pen.ellipse(0, -0.5, 12, 2.2, tuple((0.55 * picture[int(moment.spot[1]) - 1, SIZE // 2]).tolist()))
        draw_figure(
            pen,
            look,
            scene.action,
            moment.pose,
            moment.expression,
            moment.shift,
            facing=moment.facing,
            seconds=moment.seconds,
            phase=moment.phase,
        )
        frames[index] = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return frames


def locate_figure(scene: Scene, num_frames: int = FRAMES) -> np.ndarray:
    """Where the head and the hips are: float32 [num_frames, 2, 2], (x, y) in pixels from the upper left corner."""
    points = []
    for moment in _moments(scene, num_frames):
        body = place_joints(scene.subject, moment.pose, moment.expression, moment.shift, moment.facing)
        (x, y), unit = moment.spot, moment.unit
        points.append([(x + unit * part[0], y - unit * part[1]) for part in (body.head, body.hip)])
    return np.array(points, np.float32)

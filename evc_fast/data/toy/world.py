"""The toy world on disk: which combinations it has, their split, its clips and its captions."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evc_fast.data.files import replacing_folder, write_json
from evc_fast.data.toy.actions import ACTIONS
from evc_fast.data.toy.faces import EXPRESSIONS
from evc_fast.data.toy.figures import SUBJECTS
from evc_fast.data.toy.places import PLACES
from evc_fast.data.toy.scenes import FPS, FRAMES, SIZE, Scene, draw_scene
from evc_fast.data.toy.sentences import Sentence, describe

FORMAT = "evc_fast toy world 1"
SPLITS = ("train", "val", "test")
# Of the 80 pairs of subject and action that each emotion has, those that only one split shows.
_HELD_OUT = {"val": 5, "test": 15}
_CLIPS_A_COMBINATION = 2


class ToyWorldError(ValueError):
    """A folder that holds no toy world, or cannot take one."""


@dataclass(frozen=True)
class ToyWorld:
    """A rendered world.

    folder: with videos/<video_id>.mp4, captions_{train,val,test}.csv and world.json
    scenes: what each clip shows, in the order of their ids; sentences: its captions, by id
    """

    folder: Path
    seed: int
    scenes: tuple[Scene, ...]
    sentences: dict[str, tuple[Sentence, ...]]

    def of(self, split: str) -> list[Scene]:
        """The scenes of "train", "val" or "test"."""
        return [scene for scene in self.scenes if scene.split == split]

    def video(self, scene: Scene) -> Path:
        return self.folder / "videos" / f"{scene.video_id}.mp4"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ToyWorld:
        """Reads world.json. Raises ToyWorldError where there is none of this format."""
        path = Path(folder) / "world.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ToyWorldError(f"{folder} holds no toy world: {path} cannot be read ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ToyWorldError(f"{path} is not of the format {FORMAT!r}")
        scenes, sentences = [], {}
        for clip in content["clips"]:
            captions = clip.pop("captions")
            scene = Scene(**clip | {"seed": tuple(clip["seed"])})
            scenes.append(scene)
            sentences[scene.video_id] = tuple(Sentence(**c | {"subjects": tuple(c["subjects"])}) for c in captions)
        return cls(Path(folder), content["seed"], tuple(scenes), sentences)


def plan_world(seed: int = 0, *, limit: int | None = None) -> list[Scene]:
    """All scenes of the world of this seed, in the order of their ids; `limit` keeps that many of each split.

    A combination of subject, action and emotion belongs to one split alone. Places are drawn at random.
    """
    random = np.random.default_rng((seed, 0))
    pairs = [(subject, action) for subject in SUBJECTS for action in ACTIONS]
    drawn: list[tuple[str, str, str, str]] = []
    for emotion in EXPRESSIONS:
        order = random.permutation(len(pairs))
        for rank, index in enumerate(order):
            test, val = _HELD_OUT["test"], _HELD_OUT["val"]
            split = "test" if rank < test else "val" if rank < test + val else "train"
            drawn += [(split, *pairs[index], emotion)] * _CLIPS_A_COMBINATION
    places = list(PLACES)
    scenes = []
    for number, index in enumerate(random.permutation(len(drawn)).tolist()):
        split, subject, action, emotion = drawn[index]
        place = places[random.integers(len(places))]
        scenes.append(Scene(f"toy{number:04d}", split, subject, action, emotion, place, (seed, 1 + number)))
    if limit is None:
        return scenes
    kept = {scene.video_id for split in SPLITS for scene in [s for s in scenes if s.split == split][:limit]}
    return [scene for scene in scenes if scene.video_id in kept]


def render_world(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ToyWorld:
    """Renders a world into `folder`, which must be empty or not there yet; it appears when it is complete.

    limit: clips of each split, None for all (960, 80 and 240); workers: processes, None for one a core.
    `progress(done, n)` is called after each clip. Captions are comma-separated with CRLF and the header
    `VideoID,EmCaptions`, as EmVidCap's are; world.json says what every clip shows and every caption states.
    Raises ToyWorldError where the folder is in use, ValueError for a limit or number of workers below 1.
    """
    folder = Path(folder)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, not {limit}")
    workers = workers or os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ToyWorldError(f"{folder} exists and is not an empty folder: name another one, or empty it")
    scenes = plan_world(seed, limit=limit)
    with replacing_folder(folder, only_empty=True) as partial:
        (partial / "videos").mkdir(parents=True)
        for done, _ in enumerate(_render_clips(scenes, partial / "videos", workers), 1):
            if progress is not None:
                progress(done, len(scenes))
        sentences = {scene.video_id: tuple(describe(scene)) for scene in scenes}
        for split in SPLITS:
            _write_captions(partial / f"captions_{split}.csv", (s for s in scenes if s.split == split), sentences)
        write_json(partial / "world.json", _as_json(seed, scenes, sentences))
    return ToyWorld(folder, seed, tuple(scenes), sentences)


def write_clip(path: str | os.PathLike[str], frames: np.ndarray, fps: int = FPS) -> None:
    """Writes uint8 frames [n, H, W, 3] as H.264 in MP4; the same frames give the same file under one FFmpeg."""
    import av

    # Bit-exact: no encoder version and no date in the file. One thread: x264 cuts slices by their number.
    with av.open(os.fspath(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _render_clips(scenes: list[Scene], folder: Path, workers: int) -> Iterable[None]:
    if workers == 1:
        yield from (_render_clip(scene, folder) for scene in scenes)
        return
    # Spawned: a fork would inherit the locks of threads that the caller may have.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_render_clip, scenes, [folder] * len(scenes), chunksize=4)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _render_clip(scene: Scene, folder: Path) -> None:
    write_clip(folder / f"{scene.video_id}.mp4", draw_scene(scene))


def _write_captions(path: Path, scenes: Iterable[Scene], sentences: dict[str, tuple[Sentence, ...]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["VideoID", "EmCaptions"])
        for scene in scenes:
            writer.writerows([scene.video_id, sentence.text] for sentence in sentences[scene.video_id])


def _as_json(seed: int, scenes: list[Scene], sentences: dict[str, tuple[Sentence, ...]]) -> dict[str, object]:
    import av

    return {
        "format": FORMAT,
        "seed": seed,
        "size": SIZE,
        "frames": FRAMES,
        "fps": FPS,
        "versions": {"av": av.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "clips": [asdict(scene) | {"captions": [asdict(s) for s in sentences[scene.video_id]]} for scene in scenes],
    }

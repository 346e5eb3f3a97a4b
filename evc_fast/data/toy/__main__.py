"""`python -m evc_fast.data.toy`: renders the toy world, and trains its small CLIP and its FACE-net."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from evc_fast.data.toy.world import ToyWorld, ToyWorldError, render_world


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 where it succeeded, 1 with a sentence on standard error where it could not."""
    parser = argparse.ArgumentParser(prog="python -m evc_fast.data.toy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="render clips, captions and world.json into OUT")
    build = commands.add_parser(
        "build", help="render OUT/world and train OUT/assets/clip, unless they are there, and OUT/assets/model"
    )
    for command in (render, build):
        command.add_argument("out", type=Path, metavar="OUT")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--limit", type=int, help="clips of each split, for a trial")
        command.add_argument("--workers", type=int, help="processes that render, one a core by default")
    build.add_argument("--steps", type=int, help="of the CLIP's training, for a trial")
    build.add_argument("--epochs", type=int, help="of the FACE-net's training, for a trial")
    options = parser.parse_args(arguments)
    try:
        if options.command == "render":
            _render(options.out, options)
        else:
            _build(options.out, options)
    except (ToyWorldError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing half-written is left", file=sys.stderr)
        return 130
    return 0


def _render(folder: Path, options: argparse.Namespace) -> ToyWorld:
    report = _Progress("rendering")
    return render_world(folder, seed=options.seed, limit=options.limit, workers=options.workers, progress=report)


def _build(out: Path, options: argparse.Namespace) -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    folder = out / "world"
    out.mkdir(parents=True, exist_ok=True)
    world = ToyWorld.load(folder) if (folder / "world.json").exists() else _render(folder, options)
    if world.seed != options.seed:
        raise ToyWorldError(f"{folder} is of seed {world.seed}, not {options.seed}: name another OUT, or that seed")
    assets = out / "assets"
    if not (assets / "clip" / "manifest.json").exists():
        _build_clip(world, assets / "clip", options)
    _build_face_net(world, out, assets, options)
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    print(f"{assets}: {size / 1e6:.2f} MB, {(time.monotonic() - started) / 60:.1f} minutes")


def _build_clip(world: ToyWorld, folder: Path, options: argparse.Namespace) -> None:
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.toy.assets import make_manifest, save_clip, zero_shot
    from evc_fast.data.toy.probes import probe_emotions
    from evc_fast.data.toy.small_clip import ClipRecipe, load_frames, train_clip

    started = time.monotonic()
    recipe = ClipRecipe(seed=options.seed)
    recipe = recipe if options.steps is None else replace(recipe, steps=options.steps)
    report = _Progress("training CLIP")
    model, tokenizer = train_clip(
        world.of("train"), recipe, progress=lambda step, steps, loss: report(step, steps, f"loss {loss:.2f}")
    )
    frames = {split: load_frames(world, split, progress=_Progress(f"reading {split}")) for split in ("train", "test")}
    metrics: dict[str, object] = {
        "probe_emotion_test": probe_emotions(frames["train"], world.of("train"), frames["test"], world.of("test"))
    }
    metrics["minutes"] = round((time.monotonic() - started) / 60, 1)
    # Measured as it is used: the stored weights, through the towers. The manifest, put last, says that all is there.
    save_clip(model, tokenizer, folder, None)
    metrics["zero_shot_test"] = zero_shot(ClipTowers.from_pretrained(folder), frames["test"], world.of("test"))
    save_clip(model, tokenizer, folder, make_manifest(options.seed, recipe, metrics))
    for name, value in metrics.items():
        print(f"{name}: {value}")


def _build_face_net(world: ToyWorld, out: Path, assets: Path, options: argparse.Namespace) -> None:
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.toy.face_net import build_model, prepare, train

    reports: dict[str, _Progress] = {}

    def report(what: str, done: int, total: int, note: str) -> None:
        reports.setdefault(what, _Progress(what))(done, total, note)

    shutil.rmtree(out / "run", ignore_errors=True)
    prepared = prepare(world, ClipTowers.from_pretrained(assets / "clip"), out, report=report)
    overrides = [f"seed={options.seed}", "trainer.tensorboard=false"]
    if options.epochs is not None:
        overrides.append(f"trainer.epochs={options.epochs}")
    run = train(prepared, out / "run", overrides=overrides, report=report)
    manifest = build_model(prepared, run, assets / "model", clip="../clip", seed=options.seed)
    for name, value in manifest["metrics"].items():
        print(f"{name}: {value}")


class _Progress:
    """One line of progress, rewritten on a terminal, else printed at every tenth part."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.started = time.monotonic()
        self.shown = -1

    def __call__(self, done: int, total: int, note: str = "") -> None:
        terminal = sys.stdout.isatty()
        part = (100 if terminal else 10) * done // total
        if part == self.shown and done < total:
            return
        self.shown = part
        left = (time.monotonic() - self.started) * (total - done) / max(done, 1)
        line = f"{self.what}: {done} of {total}, {left:.0f} s left{', ' + note if note else ''}"
        print(f"\r{line:<78}" if terminal else line, end="" if terminal and done < total else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

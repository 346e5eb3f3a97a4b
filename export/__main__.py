"""Export a saved encoder, and CLIP's image tower, to ONNX, AOTInductor (.pt2) and TensorRT.

Every artefact is run on 200 random inputs and held against the model it was made from; where one differs, nothing is
written. The artefact folder's manifest.json tells shapes, types, versions, instruction sets, checksums and the
differences found. `evc_fast.export.load(FOLDER, NAME).run(...)` runs an artefact.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evc_fast.export.build import TARGETS, ExportOptions, export
from evc_fast.export.graph import GRAPHS
from evc_fast.export.requirements import ExportError
from evc_fast.export.signature import DTYPES


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m evc_fast.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m evc_fast.export my-encoder --to all --image-tower random:ViT-B/32",
    )
    made.add_argument("folder", nargs="?", type=Path, help="what FaceNetEncoder.save_pretrained wrote")
    made.add_argument("--to", required=True, choices=(*TARGETS, "all"), help="all: what can be made here of the three")
    made.add_argument("--out", type=Path, help="the artefact folder (default: FOLDER-export, or image-tower-export)")
    made.add_argument(
        "--dtype",
        type=_list(DTYPES),
        metavar="LIST",
        help=f"of {','.join(DTYPES)} (default: fp32, and all of them for TensorRT)",
    )
    made.add_argument(
        "--graph",
        choices=(*GRAPHS, "both"),
        help="straight: as the paper prints it, any number of frames; folded: the same function at about half the "
        "cost, num_frames frames (default: both as ONNX, folded otherwise)",
    )
    made.add_argument(
        "--image-tower",
        metavar="TOWER",
        help="export this tower too, or alone: name or folder of transformers' CLIP, or random:ViT-B/32, "
        "random:ViT-L/14, random:tiny",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the .pt2 (default: %(default)s)")
    made.add_argument("--opset", type=int, default=20, help="of ONNX, 20 or later (default: %(default)s)")
    engines = made.add_argument_group("TensorRT engines")
    engines.add_argument("--batch", type=int, default=32, help="the batch they are tuned for (default: %(default)s)")
    engines.add_argument("--max-batch", type=int, default=64, help="the largest they take (default: %(default)s)")
    engines.add_argument("--max-frames", type=int, help="most frames of a straight one (default: twice num_frames)")
    engines.add_argument("--timing-cache", type=Path, metavar="FILE", help="read if it exists, and brought up to date")
    made.add_argument("--overwrite", action="store_true", help="replace an artefact folder that is there already")
    return made


def _list(known: dict[str, object]):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        options = ExportOptions(
            targets=TARGETS if given.to == "all" else (given.to,),
            optional=TARGETS if given.to == "all" else (),
            dtypes=given.dtype,
            graphs={None: None, "both": GRAPHS}.get(given.graph, (given.graph,)),
            device=given.device,
            opset=given.opset,
            usual_batch=given.batch,
            max_batch=given.max_batch,
            max_frames=given.max_frames,
            timing_cache=given.timing_cache,
            overwrite=given.overwrite,
        )
        out = given.out
        if out is None:
            source = Path("image-tower") if given.folder is None else given.folder.resolve()
            out = source.with_name(f"{source.name}-export")
        made = export(given.folder, out, options, image_tower=given.image_tower, progress=_say)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _say(f"{out}: {len(made['artefacts'])} artefacts and manifest.json")
    for each in made["left_out"]:
        _say(f"left out: {each['target']}, because {each['reason']}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

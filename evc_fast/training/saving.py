"""A trained model as the folder that `Captioner.from_pretrained` reads, with its card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from evc_fast.data.captions import CaptionSet
from evc_fast.data.files import write_json
from evc_fast.model.captioner import FaceNet
from evc_fast.model_card import CaptionData, FrozenPart, ModelFacts, model_card, part_facts, without_path
from evc_fast.model_folder import write_model_folder
from evc_fast.training.config import CaptionFile, RunConfig
from evc_fast.training.preparation import RunData

__all__ = ["run_facts", "save_captioner"]

SCORES = "scores.json"


def save_captioner(
    folder: Path,
    model: FaceNet,
    data: RunData,
    config: RunConfig,
    *,
    step: int,
    scores: Mapping[str, float | None],
) -> None:
    """Write the model folder and scores.json into an empty folder.

    The CLIP towers are named as the configuration names them; where it names none, whoever loads the model must.
    """
    clip = config.data.clip
    if clip is not None and os.path.isdir(clip):
        clip = os.path.abspath(clip)
    write_model_folder(
        folder,
        model=model,
        repository=data.repository,
        dictionary=data.dictionary,
        clip=clip,
        clip_fingerprint=data.features.fingerprint,
        card=model_card(run_facts(model, data, config, step=step, scores=scores)),
    )
    write_json(folder / SCORES, {"step": step, "scores": scores})


def run_facts(
    model: FaceNet, data: RunData, config: RunConfig, *, step: int, scores: Mapping[str, float | None]
) -> ModelFacts:
    """What a run knows of the model that it made."""
    parts, frozen = part_facts(model, data.repository, data.dictionary, config.data.clip)
    if config.data.word_vectors is not None:
        frozen += (FrozenPart(without_path(config.data.word_vectors), "vectors of the emotion words"),)
    files = config.data.validation_captions or config.data.captions
    validation = () if data.validation is None else (_counted(data.validation, files),)
    beam = config.trainer.num_beams
    measured = None
    if scores:
        measured = (
            f"the validation videos, {len(data.validation.video_ids)} of them, step {step}, beam {beam}; the step was "
            "chosen by them, so that other videos may score lower"
        )
    loss, optimiser, trainer = config.loss, config.optimiser, config.trainer
    return ModelFacts(
        training=(_counted(data.train, config.data.captions),),
        validation=validation,
        metrics=scores,
        metrics_of=measured,
        parts=parts,
        frozen=frozen,
        settings={
            "optimiser steps": step,
            "batch size": trainer.batch_size,
            "learning rate": optimiser.lr,
            "precision": trainer.precision,
            "delta, lambda_e, lambda_cls": f"{loss.delta}, {loss.lambda_e}, {loss.lambda_cls}",
            "seed": config.seed,
            "videos left out as unreadable": len(data.skipped),
        },
    )


def _counted(captions: CaptionSet, files: list[CaptionFile]) -> CaptionData:
    names = ", ".join(Path(file.path).name for file in files) or "captions that were handed over"
    return CaptionData(names, len(captions.video_ids), len(captions))

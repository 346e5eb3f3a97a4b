"""The trainer: optimiser steps, validation, checkpoints; on one process or several, the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from evc_fast.data.files import lock_folder, write_atomically
from evc_fast.metrics import evaluate
from evc_fast.model.captioner import TeacherForcing
from evc_fast.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    link_folder,
    optimiser_tensors,
    restore_optimiser,
    restore_weights,
    trained_tensors,
)
from evc_fast.training.config import ConfigError, RunConfig, differing_keys
from evc_fast.training.dataset import Batch, CaptionBatches, CaptionSampler, DataError, VideoBatches
from evc_fast.training.evaluation import caption_videos_together
from evc_fast.training.logs import RunLog
from evc_fast.training.losses import Denominators, face_net_loss
from evc_fast.training.preparation import RunData, build_model, read_data
from evc_fast.training.saving import save_captioner
from evc_fast.training.targets import encode_targets

try:
    from accelerate import Accelerator
    from accelerate.utils import gather_object
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"training needs {error.name}: pip install 'evc-fast[train]'", name=error.name) from error

__all__ = ["RunResult", "Trainer", "TrainingError"]

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not a number."""


@dataclass
class Progress:
    """Where a run stands; with the sampler's state, all that is not a tensor."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the best one."""


@dataclass(frozen=True)
class RunResult:
    """What `Trainer.fit` leaves behind."""

    folder: Path
    best: Path
    """Folder of the best model, which `Captioner.from_pretrained` reads."""
    best_score: float | None
    """Validation CFS of it, in percent; None without validation."""
    best_step: int
    steps: int
    epochs: int
    stopped_early: bool
    skipped: tuple[str, ...]
    """Ids of the videos that were not used."""


class Trainer:
    """Trains a FaceNet as a configuration says.

    Args:
        config: ``output`` must be given.
        data: None reads what ``config.data`` names.
        listener: is given every record of log.jsonl, on the main process; "kind" is "start", "step", "validation" or
            "end".
        validating: is told (done, total) of the videos that a validation captions, on the main process.

    Under `torchrun` or `accelerate launch` every process makes one. A step's batch is ``trainer.batch_size`` captions
    whatever the number of processes and of pieces: each loss's denominator is the whole batch's, and gradients are
    added up once a step, so that all ways to cut a batch give the same gradient up to rounding.

    Raises:
        ConfigError: ``output`` is missing, or fp16 is asked for on a CPU.
        And what `read_data`, `build_model` and `encode_targets` raise.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData | None = None,
        *,
        listener: Listener | None = None,
        validating: Callable[[int, int], None] | None = None,
    ) -> None:
        if not config.output:
            raise ConfigError("output must be given: the folder of the run")
        self.config = config
        self.folder = Path(config.output)
        self._listener = listener
        self._validating = validating
        self._run_log: RunLog | None = None
        on_cpu = config.trainer.device == "cpu" or not torch.cuda.is_available()
        if on_cpu and config.trainer.precision == "fp16":
            raise ConfigError("trainer.precision=fp16 needs a GPU; on a CPU take bf16 or fp32")
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=_PRECISIONS[config.trainer.precision])
        self.data = read_data(config) if data is None else data
        self._build()

    def _build(self) -> None:
        config, data, device = self.config, self.data, self.accelerator.device
        self.model = build_model(config, data, device=device)
        num_triplets = config.model.encoder.num_triplets
        targets = encode_targets(self.model.decoder, data.train.texts, data.dictionary.words)
        videos = VideoBatches(data.train.video_ids, data.features, data.repository, num_triplets)
        self.batches = CaptionBatches(data.train.captions, videos, targets, config.loss.delta)
        self.validation: VideoBatches | None = None
        if data.validation is not None:
            self.validation = VideoBatches(data.validation.video_ids, data.features, data.repository, num_triplets)
        self.sampler = CaptionSampler(len(self.batches), config.trainer.batch_size, config.seed)
        self.progress = Progress()
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", config.trainer.keep)
        self.names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        options = config.optimiser
        self.optimiser = torch.optim.Adam(
            list(self.names),
            lr=options.lr,
            betas=tuple(options.betas),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        # Adam's steps go through accelerate, which skips those whose 16-bit gradients overflowed.
        self._stepper = self.accelerator.prepare_optimizer(self.optimiser)
        if config.trainer.gradient_checkpointing and hasattr(self.model.decoder, "base"):
            self.model.decoder.base.activation_checkpointing_enable()
        self.fingerprint = self._fingerprint()
        self._agree()
        # From here on each process draws its own dropout.
        torch.manual_seed(config.seed * 1_000_003 + 1 + self.accelerator.process_index)

    def fit(self, *, resume: bool = False) -> RunResult:
        """Train to the last epoch, or until ``patience`` validations have not become better.

        Args:
            resume: go on from the newest complete checkpoint in the run's folder, at the very batch that was next; on a
                CPU with the same numbers, bit for bit, as if nothing had happened. Begins anew where there is none.

        Raises:
            FileExistsError: the folder has checkpoints of a run, and ``resume`` is False; or another process trains
                into it.
            CheckpointError: the checkpoint is damaged, or of another configuration, data or number of processes.
            TrainingError: a loss is not a number.
        """
        lock = self._lock() if self.accelerator.is_main_process else contextlib.nullcontext()
        try:
            with lock:
                self._start(resume)
                self._run_epochs()
                return self._finish()
        finally:
            if self._run_log is not None:
                self._run_log.close()

    def _lock(self) -> TextIO:
        try:
            return lock_folder(self.folder)
        except BlockingIOError:
            raise FileExistsError(f"another process is training into {self.folder}: name another output") from None

    def _run_epochs(self) -> None:
        trainer = self.config.trainer
        while self.sampler.epoch < trainer.epochs and not self._stopped:
            for rows in self.sampler:
                self._step(rows)
                if trainer.save_every is not None and self.progress.step % trainer.save_every == 0:
                    self._save()
            self._end_epoch()
            self._save()

    def _finish(self) -> RunResult:
        result = RunResult(
            folder=self.folder,
            best=self.folder / "best",
            best_score=self.progress.best_score,
            best_step=self.progress.best_step if self.progress.best_step is not None else self.progress.step,
            steps=self.progress.step,
            epochs=self.sampler.epoch,
            stopped_early=self.sampler.epoch < self.config.trainer.epochs,
            skipped=tuple(entry.video_id for entry in self.data.skipped),
        )
        self._record("end", {"epochs": result.epochs, "best_score": result.best_score, "best_step": result.best_step})
        self.accelerator.wait_for_everyone()
        return result

    @property
    def _stopped(self) -> bool:
        patience = self.config.trainer.patience
        return patience is not None and self.progress.stale >= patience

    def _start(self, resume: bool) -> None:
        saved = self.checkpoints.newest()
        if saved is not None and not resume:
            raise FileExistsError(
                f"{self.folder} has checkpoints of a run: resume it, or name another folder as output"
            )
        if saved is not None:
            self._restore(self.checkpoints.load(saved))
        self.accelerator.wait_for_everyone()  # all have read before anything is written
        if self.accelerator.is_main_process:
            write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode())
            self._run_log = RunLog(self.folder, self.progress.step, tensorboard=self.config.trainer.tensorboard)
        skipped = self.data.skipped
        if len(skipped) and self.accelerator.is_main_process:
            _log.warning("%d videos are not used:\n%s", len(skipped), skipped.describe())
        self._record(
            "start",
            {
                "resumed": saved is not None,
                "captions": len(self.batches),
                "videos": len(self.data.train.video_ids),
                "validation_videos": 0 if self.validation is None else len(self.validation),
                "skipped": skipped.to_json(),
                "processes": self.accelerator.num_processes,
                "parameters": self.model.trainable_parameters(),
                "batches_an_epoch": self.sampler.batches_an_epoch,
            },
        )

    def _step(self, rows: Sequence[int]) -> None:
        """One optimiser step on the captions of these rows."""
        config, accelerator = self.config, self.accelerator
        begin = time.perf_counter()
        self.model.train()
        lr = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        denominators = self.batches.denominators(rows)
        share = rows[accelerator.process_index :: accelerator.num_processes]
        size = config.trainer.micro_batch_size or max(len(share), 1)
        losses = torch.zeros(3, device=accelerator.device)
        for start in range(0, len(share), size):
            batch = self.batches.batch(share[start : start + size]).to(accelerator.device)
            losses += self._backward(batch, denominators)
        self._add_up_gradients()
        losses = accelerator.reduce(losses, reduction="sum")
        total, caption, emotion = losses.tolist()
        if not math.isfinite(total):
            videos = ", ".join(dict.fromkeys(self.batches.videos_of(rows)))
            raise TrainingError(
                f"the loss of step {self.progress.step + 1} is {total}: look at the features of its videos ({videos}), "
                "or take a lower optimiser.lr"
            )
        clip = config.trainer.clip_norm or math.inf
        norm: float | None = float(accelerator.clip_grad_norm_(list(self.names), clip))
        if not math.isfinite(norm):
            if accelerator.scaler is None:
                raise TrainingError(
                    f"the gradient of step {self.progress.step + 1} has norm {norm}: take a lower optimiser.lr"
                )
            norm = None  # of float16: the step is skipped, and gradients are scaled down from here on
        self._stepper.step()
        self.optimiser.zero_grad()
        self.progress.step += 1
        numbers = {"loss": total, "caption_loss": caption, "emotion_loss": emotion, "gradient_norm": norm, "lr": lr}
        self._record(
            "step",
            {
                **numbers,
                "tokens": denominators.tokens,
                "captions": denominators.captions,
                "seconds": time.perf_counter() - begin,
            },
        )
        if self._run_log is not None and self.progress.step % config.trainer.log_every == 0:
            self._run_log.show("training", numbers, self.progress.step)

    def _backward(self, batch: Batch, denominators: Denominators) -> Tensor:
        """Add the gradients of a piece of the step's batch; its three losses [3]."""
        loss = self.config.loss
        with self.accelerator.autocast():
            output = self._forward(batch)
        losses = face_net_loss(
            output.logits,
            output.emotion_logits,
            batch.target_ids,
            batch.weights,
            batch.words,
            denominators,
            lambda_e=loss.lambda_e,
            lambda_cls=loss.lambda_cls,
        )
        self.accelerator.backward(losses.total)
        return torch.stack(losses).detach()

    def _forward(self, batch: Batch) -> TeacherForcing:
        groups = batch.groups if self.model.encoder.config.merge_identical_triplets else None
        features = (batch.video, batch.triplets, batch.similarity)
        if not self.config.trainer.gradient_checkpointing:
            return self.model(*features, batch.target_ids, groups)
        encoder, decoder = self.model.encoder, self.model.decoder
        encoded = recompute(encoder, *features, groups, use_reentrant=False)
        if hasattr(decoder, "base"):  # an LLM recomputes layer by layer
            return TeacherForcing(decoder(encoded.tokens, batch.target_ids), encoded.emotion_logits)
        logits = recompute(decoder, encoded.tokens, batch.target_ids, use_reentrant=False)
        return TeacherForcing(logits, encoded.emotion_logits)

    def _add_up_gradients(self) -> None:
        """Sum the gradients over the processes: one sum a step.

        DistributedDataParallel would take the mean over processes whose shares are unequal, and wait for one whose
        share of an epoch's last batch is empty.
        """
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.names)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        together = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
        pieces = together.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def _learning_rate(self) -> float:
        """Of the step that comes: linear warm-up, then constant or half a cosine."""
        options, step = self.config.optimiser, self.progress.step
        if step < options.warmup_steps:
            return options.lr * (step + 1) / options.warmup_steps
        if options.schedule == "constant":
            return options.lr
        last = self.sampler.batches_an_epoch * self.config.trainer.epochs
        done = (step - options.warmup_steps) / max(last - options.warmup_steps, 1)
        return options.lr * 0.5 * (1 + math.cos(math.pi * done))

    def _end_epoch(self) -> None:
        """Validate where it is due, keep the model if it is the best, and turn to the next epoch."""
        trainer, progress = self.config.trainer, self.progress
        epoch = self.sampler.epoch + 1
        due = epoch % trainer.evaluate_every == 0 or epoch == trainer.epochs
        if self.validation is None:
            progress.best_step = progress.step
            self._keep_best({})
        elif due:
            scores = self._validate()
            best, score = progress.best_score, scores["CFS"]
            progress.stale = 0 if best is None or score > best else progress.stale + 1
            better = best is None or score >= best  # of equals the later one, which has seen more
            if better:
                progress.best_score, progress.best_step = score, progress.step
                self._keep_best(scores)
            self._record("validation", {"epoch": epoch, "scores": scores, "best": better})
            if self._run_log is not None:
                self._run_log.show("validation", scores, progress.step)
        self.sampler.next_epoch()

    def _validate(self) -> dict[str, float | None]:
        """Scores of the validation videos, the same on every process."""
        trainer = self.config.trainer
        hypotheses = caption_videos_together(
            self.model,
            self.validation,
            self.accelerator,
            batch_size=trainer.batch_size,
            num_beams=trainer.num_beams,
            max_new_tokens=trainer.max_new_tokens,
            progress=self._validating if self.accelerator.is_main_process else None,
        )
        scores: list[dict[str, float | None]] = []
        if self.accelerator.is_main_process:
            references = self.data.validation.references()
            # METEOR's Java program would start anew each time, and decides nothing here.
            scores = [evaluate(hypotheses, references, self.data.dictionary, meteor=False).overall]
        return gather_object(scores)[0]

    def _keep_best(self, scores: dict[str, float | None]) -> None:
        self.model.random_weights = False
        if hasattr(self.model.decoder, "vocabulary"):
            self.model.decoder.random_weights = False
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            save_captioner(folder, self.model, self.data, self.config, step=self.progress.step, scores=scores)

        link_folder(self.folder / "best", write, f"step-{self.progress.step:08d}")

    def _save(self) -> None:
        """A checkpoint of all that the next step depends on; every process brings its generator's state."""
        accelerator = self.accelerator
        generators = {"cpu": torch.get_rng_state()}
        if accelerator.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(accelerator.device)
        generators = {
            name: accelerator.gather(state[None].to(accelerator.device)).cpu() for name, state in generators.items()
        }
        if accelerator.is_main_process:
            tensors = {
                "model": trained_tensors(self.model),
                "optimiser": optimiser_tensors(self.optimiser, self.names),
                "rng": generators,
            }
            state = {
                "progress": dataclasses.asdict(self.progress),
                "sampler": self.sampler.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "processes": accelerator.num_processes,
                "fingerprint": self.fingerprint,
                "config": self.config.model_dump(mode="json"),
            }
            self.checkpoints.save(self.progress.step, tensors, state)
        accelerator.wait_for_everyone()

    def _restore(self, saved: Checkpoint) -> None:
        accelerator, state = self.accelerator, saved.state
        differing = differing_keys(state["config"], self.config.model_dump(mode="json"))
        if differing:
            raise CheckpointError(f"{saved.path} is of another configuration: {'; '.join(differing)}")
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{saved.path} is of other data: captions, features, repository, emotion words or their vectors have "
                "changed"
            )
        if state["processes"] != accelerator.num_processes:
            raise CheckpointError(
                f"{saved.path} was saved by {state['processes']} processes and can only go on with as many, this run "
                f"has {accelerator.num_processes}"
            )
        kind = "cuda" if "cuda" in saved.tensors["rng"] else "cpu"
        if kind != accelerator.device.type:
            raise CheckpointError(
                f"{saved.path} was saved on {kind} and can only go on there, this run is on {accelerator.device.type}"
                + ("; trainer.device=cpu keeps it there" if kind == "cpu" else "")
            )
        restore_weights(self.model, saved.tensors["model"])
        restore_optimiser(self.optimiser, self.names, saved.tensors["optimiser"])
        self.sampler.load_state_dict(state["sampler"])
        self.progress = Progress(**state["progress"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        # Copies: PyTorch 2.13 crashes on a state that is a row of a larger tensor, the first one excepted.
        generators = {name: states[accelerator.process_index].clone() for name, states in saved.tensors["rng"].items()}
        torch.set_rng_state(generators["cpu"])
        if accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], accelerator.device)

    def _fingerprint(self) -> str:
        """Of the data that a run learns from and is judged by."""
        data = self.data
        parts = [self.batches.fingerprint(), data.features.fingerprint, " ".join(data.dictionary.words)]
        if self.validation is not None and data.validation is not None:
            parts += [self.validation.fingerprint(), *(f"{c.video_id} {c.text}" for c in data.validation)]
        digest = hashlib.sha256("\n".join(parts).encode())
        # E_0 by CLIP follows from the words and the features' fingerprint, up to rounding.
        if data.emotion_features is not None and self.config.data.word_vectors is not None:
            digest.update(data.emotion_features.numpy().tobytes())
        return digest.hexdigest()

    def _agree(self) -> None:
        """Raise DataError unless all processes hold the same data and the same weights."""
        weights = sum(parameter.detach().double().sum() for parameter in self.names)
        if len(set(gather_object([f"{self.fingerprint} {float(weights)!r}"]))) > 1:
            raise DataError("the processes have read different data, or made different weights")

    def _record(self, kind: str, content: dict[str, Any]) -> None:
        record = {"kind": kind, "step": self.progress.step, "epoch": self.sampler.epoch} | content
        if self._run_log is not None:
            self._run_log.write(record)
        if self._listener is not None and self.accelerator.is_main_process:
            self._listener(record)

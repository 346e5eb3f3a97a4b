"""FACE-net whole: the encoder, equations (10)-(29), and a decoder that reads its tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evc_fast.model.checkpoint import CONFIG_NAME, read_json
from evc_fast.model.decoders import load_decoder
from evc_fast.model.decoders.base import evaluation_mode
from evc_fast.model.encoder import Explanation, FaceNetEncoder
from evc_fast.ops.dispatch import Impl


class TeacherForcing(NamedTuple):
    """What training reads of a batch."""

    logits: Tensor
    """[B, T, vocabulary] of the target ids, for L_e (30)."""
    emotion_logits: Tensor | None
    """[B, W], for L_cls (31); None without emotion augmentation."""


class Generated(NamedTuple):
    """What inference gives of a batch."""

    ids: Tensor
    """[B, T] int64, without the start token, padded after EOS."""
    emotion_logits: Tensor | None
    """[B, W]; None without emotion augmentation."""
    explanation: Explanation | None
    """Only with ``explain=True``."""


class FaceNet(nn.Module):
    """Video and triplet features in, caption ids out.

    Args:
        encoder: its ``output_dim`` d_out must be the decoder's ``input_dim``.
        decoder: any of :mod:`evc_fast.model.decoders`.

    Attributes:
        random_weights: True until a trainer or a checkpoint says otherwise; saved and loaded with the model.

    Raises:
        ValueError: the two widths differ.
    """

    def __init__(self, encoder: FaceNetEncoder, decoder: nn.Module) -> None:
        super().__init__()
        if encoder.config.output_dim != decoder.input_dim:
            raise ValueError(
                f"encoder must write tokens of the decoder's width {decoder.input_dim}, its output_dim is"
                f" {encoder.config.output_dim}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.random_weights = True

    def forward(
        self,
        video: Tensor,
        triplets: Tensor | None,
        similarity: Tensor | None,
        target_ids: Tensor,
        groups: Tensor | None = None,
        *,
        impl: Impl | None = None,
    ) -> TeacherForcing:
        """Teacher forcing: logits of ``target_ids`` [B, T] int64, each given the video and the targets before it.

        The other arguments, and the errors raised, are those of :class:`FaceNetEncoder`'s and the decoder's forward.
        """
        encoded = self.encoder(video, triplets, similarity, groups, impl=impl)
        return TeacherForcing(self.decoder(encoded.tokens, target_ids), encoded.emotion_logits)

    @torch.no_grad()
    def generate(
        self,
        video: Tensor,
        triplets: Tensor | None = None,
        similarity: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        explain: bool = False,
        impl: Impl | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> Generated:
        """Caption ids by beam search; inputs as of :class:`FaceNetEncoder`, search options as of the decoder.

        Runs as in evaluation mode (no dropout), whatever mode the model is in.
        """
        with evaluation_mode(self.encoder):
            encoded = self.encoder(video, triplets, similarity, groups, explain=explain, impl=impl)
        ids = self.decoder.generate(
            encoded.tokens,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
        )
        return Generated(ids, encoded.emotion_logits, encoded.explanation)

    def trainable_parameters(self) -> int:
        """Number of parameters that training changes: the encoder's, and the decoder's or its LoRA adapter's."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def all_parameters(self) -> int:
        """Number of all parameters, the frozen LLM's with them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``encoder/`` and ``decoder/``; of an LLM the adapter alone, and where it comes from.

        Raises:
            NotADirectoryError: ``folder`` is a file.
            ValueError: the decoder's LoRA adapter is merged already.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder must be a directory to save into, {folder} is a file")
        # The decoder first: it may refuse, and then nothing is left behind that looks like a model.
        self.decoder.save_pretrained(folder / "decoder")
        self.encoder.save_pretrained(folder / "encoder")
        config = {"class": type(self).__name__, "random_weights": self.random_weights}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        decoder_dtype: torch.dtype | None = None,
    ) -> FaceNet:
        """Read what :meth:`save_pretrained` wrote, in evaluation mode; the decoder in ``decoder_dtype`` or as saved.

        Raises:
            FileNotFoundError: the folder or one of its parts is missing.
            ValueError: a part is damaged or belongs to another class.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: expected what FaceNet.save_pretrained writes")
        config = read_json(path)
        if (
            not isinstance(config, dict)
            or set(config) != {"class", "random_weights"}
            or config["class"] != cls.__name__
            or not isinstance(config["random_weights"], bool)
        ):
            raise ValueError(f"{path} does not describe a {cls.__name__}")
        encoder = FaceNetEncoder.from_pretrained(Path(folder) / "encoder").to(device)
        decoder = load_decoder(Path(folder) / "decoder", dtype=decoder_dtype, device=device)
        model = cls(encoder, decoder)
        model.random_weights = config["random_weights"]
        return model.eval()

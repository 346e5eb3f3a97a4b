"""The bytes that one caption must move, stage by stage: a lower bound, whatever the implementation.

Every weight is read once in a stage's run, every input read once and every output written once. A decode step reads its
weights once for all beams, the keys and values of the words so far once a beam, and those of the prefix once for all
beams; a table of embeddings counts by the rows that are looked up. What a stage writes and reads again inside itself is
left out.
"""

from __future__ import annotations

import os

from _stages import ENCODER, PREFIX, STEP, TOWER
from torch import Tensor, nn

from evc_fast.model.captioner import FaceNet
from evc_fast.pipeline import CaptionPipeline


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of these tensors, each distinct one once."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def weights(*modules: nn.Module) -> int:
    """Bytes of the modules' distinct weights."""
    return nbytes(*(weight for module in modules for weight in module.parameters()))


def caption_bytes(
    pipeline: CaptionPipeline, source: str | None, num_beams: int, new_tokens: int, *, folded: bool
) -> dict[str, int]:
    """Bytes of each stage of one caption, all runs of the stage together.

    `source` None: no video file is read. `folded`: the encoder runs on its folded weights.
    """
    model, config = pipeline.model, pipeline.model.encoder.config
    frames = pipeline.read(source).frames
    features = pipeline.encode_frames([frames])
    found = pipeline.retrieve(features)
    tokens = pipeline.encode(features, found).tokens

    moved = {}
    if source is not None:
        moved["video decode"] = os.path.getsize(source) + nbytes(frames)
    moved[TOWER] = _image_tower(pipeline) + nbytes(frames, features)
    # The index holds float32; the triplets' features are gathered: read and written.
    index = len(pipeline.repository) * config.text_dim * 4
    moved["retrieval"] = index + nbytes(features, found.similarity) + 2 * nbytes(found.triplets)
    encoder = model.encoder.fold() if folded else model.encoder
    inputs = nbytes(features, found.triplets, found.similarity)
    moved[ENCODER] = weights(encoder) + nbytes(*encoder.buffers()) + inputs + nbytes(tokens)
    prefix = tokens.shape[1] + len(getattr(model.decoder, "prompt_ids", ()))
    return moved | _decoder(model, prefix, num_beams, new_tokens)


def _image_tower(pipeline: CaptionPipeline) -> int:
    named = pipeline.towers.model.named_parameters()
    return nbytes(*(weight for name, weight in named if "vision" in name or "visual" in name))


def _decoder(model: FaceNet, prefix: int, num_beams: int, new_tokens: int) -> dict[str, int]:
    """Of an LLM's prefix and of all decode steps, for `prefix` positions of [tokens ; prompt]."""
    decoder = model.decoder
    kind = decoder.family if hasattr(decoder, "family") else decoder.kind
    item = decoder.dtype.itemsize
    words = sum(range(new_tokens))  # positions of earlier words, summed over the steps
    if kind == "t5":
        config, t5 = decoder.base.config, decoder.base
        embedding, attention = nbytes(t5.shared.weight), config.num_heads * config.d_kv
        vector = config.d_model * item
        keys_values = 2 * config.num_decoder_layers * attention * item  # of one position
        cross = nbytes(
            *(
                projection.weight
                for layer in t5.decoder.block
                for projection in (layer.layer[1].EncDecAttention.k, layer.layer[1].EncDecAttention.v)
            )
        )
        # Cross-attention's keys and values are made at the first step; the other weights are read at every step.
        step = weights(t5.decoder) - embedding - cross + nbytes(t5.lm_head.weight)
        step += prefix * keys_values + num_beams * (vector + config.vocab_size * item)
        return {
            PREFIX: weights(t5.encoder) - embedding + 2 * prefix * vector,
            STEP: new_tokens * step + cross + words * num_beams * keys_values,
        }
    if kind == "opt":
        config, opt = decoder.base.config, decoder.base
        vector = config.hidden_size * item
        keys_values = 2 * config.num_hidden_layers * vector
        read = weights(opt) - nbytes(opt.model.decoder.embed_positions.weight)  # the embedding is the output map too
        step = read + prefix * keys_values + num_beams * (vector + config.vocab_size * item)
        # The pass over the prefix gives the first token.
        return {
            PREFIX: read + prefix * (vector + keys_values) + config.vocab_size * item,
            STEP: (new_tokens - 1) * step + words * num_beams * keys_values,
        }
    vector = decoder.input_dim * item
    logits = num_beams * decoder.output.weight.shape[0] * item
    read = weights(decoder) - nbytes(decoder.embedding.weight)
    if kind == "lstm":
        once = weights(decoder.initial, decoder.attention_key)
        prefix_state = prefix * (vector + decoder.config.attention_dim * item)
        beam = 4 * decoder.config.hidden_dim * item + decoder.config.embedding_dim * item  # hidden and cell in and out
        return {STEP: once + new_tokens * (read - once + prefix_state + num_beams * beam + logits)}
    layers = decoder.config.num_layers
    once = weights(*(layer.cross_kv for layer in decoder.layers))
    step = read - once + layers * 2 * prefix * vector + num_beams * vector + logits
    return {STEP: once + new_tokens * step + words * num_beams * layers * 2 * vector}

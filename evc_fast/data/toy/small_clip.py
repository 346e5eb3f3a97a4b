"""A small CLIP of the toy world: its tokenizer, its towers, their contrastive training, and its zero-shot figures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD
from evc_fast.data.toy.actions import ACTIONS
from evc_fast.data.toy.faces import EXPRESSIONS
from evc_fast.data.toy.figures import SUBJECTS
from evc_fast.data.toy.places import PLACES
from evc_fast.data.toy.scenes import FRAMES, SIZE, Scene, locate_figure
from evc_fast.data.toy.sentences import CAPTIONS, EMOTION_WORDS, NOUNS, VERBS, Sentence
from evc_fast.data.toy.world import ToyWorld
from evc_fast.data.video import frame_indices, read_frames

EMOTION_TEMPLATE = "a photo of a person feeling {}"
PART_TEMPLATE = "A photo of {}"
NUM_FRAMES = 16  # that a clip is sampled at, as captioning samples it

_SHIFT = 8  # pixels by which training frames are moved at most
_MAX_SCALE = 50.0  # of the cosines, CLIP's inverse temperature
# Emotion is small in the picture and counts most.
_FACT_WEIGHTS = {"subject": 0.5, "action": 0.5, "emotion": 1.0, "place": 0.5}
_HEAD_RADIUS, _BODY_RADIUS = 14.0, 18.0  # pixels
_PARTS_OF = {"subject": (0,), "action": (1,), "emotion": (0,)}  # 0 head, 1 body


@dataclass(frozen=True)
class ClipRecipe:
    """How the small CLIP is made.

    Both towers have `width`, `heads` and a projection to `width`; pictures are 96 pixels in patches of `patch`.
    frames: random frames of each clip in a step, their features averaged as retrieval does; clips: in a step
    """

    width: int = 96
    heads: int = 4
    image_layers: int = 4
    text_layers: int = 2
    patch: int = 12
    clips: int = 64
    frames: int = 1
    epochs: int = 120
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    seed: int = 0


def fact_prompts() -> dict[str, list[str]]:
    """For each fact the prompts that tell its values apart, in the order of SUBJECTS, ACTIONS, emotions and PLACES."""
    return {
        "subject": [PART_TEMPLATE.format(subject) for subject in SUBJECTS],
        "action": [PART_TEMPLATE.format(VERBS[action].lemma) for action in ACTIONS],
        "emotion": [EMOTION_TEMPLATE.format(EMOTION_WORDS[emotion].adjectives[0]) for emotion in EXPRESSIONS],
        "place": [PART_TEMPLATE.format(place) for place in PLACES],
    }


FACTS: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "action": tuple(ACTIONS),
    "emotion": tuple(EXPRESSIONS),
    "place": tuple(PLACES),
}


def prompts_of(scene: Scene) -> list[Sentence]:
    """What a triplet's part or an emotion word becomes before the text tower, each true of the scene."""

    def state(text: str, subjects: Sequence[str] = SUBJECTS, **facts: str) -> Sentence:
        open_facts = dict.fromkeys(("action", "emotion", "place")) | facts
        return Sentence(text=text, kind="prompt", subjects=tuple(subjects), **open_facts)

    verb, words = VERBS[scene.action], EMOTION_WORDS[scene.emotion]
    prompts = [state(PART_TEMPLATE.format(noun), fits) for noun, fits in NOUNS.items() if scene.subject in fits]
    things = [verb.lemma, *([verb.thing] if verb.thing else [])]
    prompts += [state(PART_TEMPLATE.format(thing), action=scene.action) for thing in things]
    prompts += [state(PART_TEMPLATE.format(word), emotion=scene.emotion) for word in words.all]
    prompts += [state(EMOTION_TEMPLATE.format(word), emotion=scene.emotion) for word in words.all]
    prompts.append(state(PART_TEMPLATE.format(scene.place), place=scene.place))
    return prompts


def make_tokenizer(texts: Sequence[str]) -> Any:
    """CLIP's tokenizer with a vocabulary of its own: every word of `texts` one token, all else by bytes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizerFast

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # The end-of-word form of every byte is learned from a text that has each of them as a word.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for character in sorted(alphabet):
        vocabulary.setdefault(f"{character}</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=77)


def make_model(recipe: ClipRecipe, tokenizer: Any) -> Any:
    """An untrained CLIPModel of the recipe's shape."""
    from transformers import CLIPConfig, CLIPModel

    shape = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.heads,
        "projection_dim": recipe.width,
    }
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = {"num_hidden_layers": recipe.text_layers, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"num_hidden_layers": recipe.image_layers, "image_size": SIZE, "patch_size": recipe.patch}
    config = CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=recipe.width)
    return CLIPModel(config)


def load_frames(
    world: ToyWorld, split: str, num_frames: int = NUM_FRAMES, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """The sampled frames of a split's clips, in the order of `world.of(split)`: uint8 [n, num_frames, 96, 96, 3]."""
    scenes = world.of(split)
    frames = torch.empty(len(scenes), num_frames, SIZE, SIZE, 3, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sampled = pool.map(lambda scene: read_frames(world.video(scene), num_frames).frames, scenes)
        for row, clip in enumerate(sampled):
            frames[row] = clip
            if progress is not None:
                progress(row + 1, len(scenes))
    return frames


def train_clip(
    world: ToyWorld,
    recipe: ClipRecipe | None = None,
    *,
    frames: Tensor | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Any, Any]:
    """Trains a small CLIP on the training clips of `world`: (CLIPModel in evaluation mode, tokenizer).

    Contrastive: pictures against captions, where a caption is right for every clip of the batch of which it is true,
    and against the prompts that tell the values of one fact apart. A picture's feature alone would take long to find
    the face, so for the second half of the loss the patches of the head and of the body read the same prompts: they
    know of emotion and subject, or of the action, before the class token gathers it.
    frames: what `load_frames(world, "train")` gives, where it is at hand; None reads them.
    `progress(step, steps, loss)` is called after each step. The same recipe and number of threads give the same model.
    """
    recipe = recipe or ClipRecipe()
    scenes = world.of("train")
    sentences = {s.video_id: [*world.sentences[s.video_id], *prompts_of(s)] for s in scenes}
    tokenizer = make_tokenizer([sentence.text for row in sentences.values() for sentence in row])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = make_model(recipe, tokenizer).train()
        batches = _Batches(world, recipe, load_frames(world, "train") if frames is None else frames)
        optimiser = _make_optimiser(model, recipe)
        steps = recipe.epochs * batches.steps
        loss_of = _Loss(model, tokenizer, recipe)
        for step in range(steps):
            for group in optimiser.param_groups:
                warm = min(1.0, (step + 1) / (0.05 * steps))
                group["lr"] = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
            loss = loss_of(batches.draw(sentences))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if progress is not None:
                progress(step + 1, steps, loss.item())
    return model.eval(), tokenizer


@dataclass(frozen=True)
class _Batch:
    """What one step sees.

    pixel_values: [n, frames, 3, S, S]; facts: name -> labels [n]; parts: bool [n frames, 2, patches], head and body
    true: [n, texts], 1 where the text is true of the clip, else 0
    """

    pixel_values: Tensor
    facts: dict[str, Tensor]
    parts: Tensor
    texts: list[str]
    true: Tensor


class _Batches:
    """Random batches of augmented training frames."""

    def __init__(self, world: ToyWorld, recipe: ClipRecipe, frames: Tensor) -> None:
        self.recipe = recipe
        self.scenes = world.of("train")
        self.frames = frames
        self.steps = max(1, len(self.scenes) // recipe.clips)
        indices = frame_indices(FRAMES, NUM_FRAMES)
        # [clips, frames, head or hips, (x, y)]
        self.places = torch.stack([torch.from_numpy(locate_figure(scene))[indices] for scene in self.scenes])
        self.labels = {k: torch.tensor([v.index(getattr(s, k)) for s in self.scenes]) for k, v in FACTS.items()}
        self._order: list[int] = []

    def draw(self, sentences: dict[str, list[Sentence]]) -> _Batch:
        if len(self._order) < min(self.recipe.clips, len(self.scenes)):
            self._order = torch.randperm(len(self.scenes)).tolist()
        picked, self._order = self._order[: self.recipe.clips], self._order[self.recipe.clips :]
        pixel_values, places = self._augment(picked)
        said: dict[str, Sentence] = {}
        for index in picked:
            rows = sentences[self.scenes[index].video_id]
            for choice in (*torch.randperm(CAPTIONS)[:2].tolist(), int(torch.randint(CAPTIONS, len(rows), ()))):
                said.setdefault(rows[choice].text, rows[choice])
        true = [[sentence.is_true_of(self.scenes[index]) for sentence in said.values()] for index in picked]
        return _Batch(
            pixel_values=pixel_values,
            facts={fact: labels[picked] for fact, labels in self.labels.items()},
            parts=_patches_of(places.flatten(0, 1), self.recipe.patch),
            texts=list(said),
            true=torch.tensor(true, dtype=torch.float32),
        )

    def _augment(self, picked: list[int]) -> tuple[Tensor, Tensor]:
        """Shifted, mirrored and tinted frames of some clips, normalised as CLIP's, and where their figures are then."""
        mean, std = 255 * torch.tensor(CLIP_MEAN), 255 * torch.tensor(CLIP_STD)
        count, pixels = self.recipe.frames, torch.arange(SIZE)
        values = torch.empty(len(picked), count, SIZE, SIZE, 3)
        places = torch.empty(len(picked), count, 2, 2)
        for row, index in enumerate(picked):
            chosen = torch.randperm(NUM_FRAMES)[:count]
            dx, dy = torch.randint(-_SHIFT, _SHIFT + 1, (2,)).tolist()
            columns, lines = (pixels + dx).clamp(0, SIZE - 1), (pixels + dy).clamp(0, SIZE - 1)
            places[row] = self.places[index][chosen] - torch.tensor([dx, dy])
            if torch.rand(()) < 0.5:
                columns = columns.flip(0)
                places[row, ..., 0] = SIZE - places[row, ..., 0]
            gain, tint = 1 + 0.2 * (2 * torch.rand(3) - 1), 0.2 * (2 * torch.rand(3) - 1)
            frames = self.frames[index][chosen][:, lines][:, :, columns].float()
            values[row] = (frames - mean) * (gain / std) + tint
        return values.permute(0, 1, 4, 2, 3).contiguous(), places


def _patches_of(places: Tensor, patch: int) -> Tensor:
    """The patches of the head and of the body: places [n, 2, 2] in pixels -> bool [n, 2, patches]."""
    centres = torch.arange(SIZE // patch) * patch + patch / 2
    x, y = centres.repeat(len(centres)), centres.repeat_interleave(len(centres))
    distance = ((torch.stack([x, y], -1) - places[:, :, None]) ** 2).sum(-1).sqrt()
    parts = distance < torch.tensor([_HEAD_RADIUS, _BODY_RADIUS])[:, None]
    return parts | (distance == distance.amin(-1, keepdim=True))  # at least the nearest one


class _Loss:
    """The contrastive loss of one batch."""

    def __init__(self, model: Any, tokenizer: Any, recipe: ClipRecipe) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.prompts = fact_prompts()

    def __call__(self, batch: _Batch) -> Tensor:
        images, tokens = self._encode_images(batch.pixel_values)
        everything = [*batch.texts, *(prompt for prompts in self.prompts.values() for prompt in prompts)]
        features = self._encode_texts(everything)
        scale = self.model.logit_scale.exp().clamp(max=_MAX_SCALE)
        logits = scale * images @ features[: len(batch.texts)].T
        # Each direction: the mean over all that are right.
        right = batch.true
        of_texts = -(right * logits.log_softmax(0)).sum(0) / right.sum(0)
        of_images = -(right * logits.log_softmax(1)).sum(1) / right.sum(1).clamp_min(1)
        loss = 0.5 * (of_texts.mean() + of_images.mean())
        start = len(batch.texts)
        for fact, prompts in self.prompts.items():
            choices = features[start : start + len(prompts)].T
            start += len(prompts)
            loss = loss + _FACT_WEIGHTS[fact] * F.cross_entropy(scale * images @ choices, batch.facts[fact])
            for part in _PARTS_OF.get(fact, ()):
                weights = batch.parts[:, part].float()
                labels = batch.facts[fact].repeat_interleave(self.recipe.frames)
                local = (scale * tokens @ choices).log_softmax(-1)
                local = -local.gather(2, labels[:, None, None].expand(-1, local.shape[1], 1))[..., 0]
                loss = loss + _FACT_WEIGHTS[fact] * ((local * weights).sum(1) / weights.sum(1)).mean()
        return loss

    def _encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[n, frames, 3, S, S] -> the clips' features [n, D], the patches' before the last layer [n frames, p, D]."""
        tower, project = self.model.vision_model, self.model.visual_projection
        output = tower(pixel_values=pixel_values.flatten(0, 1), output_hidden_states=True)
        clips = project(output.pooler_output).unflatten(0, pixel_values.shape[:2]).mean(1)
        patches = project(tower.post_layernorm(output.hidden_states[-2][:, 1:]))
        return F.normalize(clips, dim=-1), F.normalize(patches, dim=-1)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer(texts)["input_ids"]
        longest, end = max(map(len, ids)), self.tokenizer.eos_token_id
        padded = torch.tensor([row + [end] * (longest - len(row)) for row in ids])
        return F.normalize(self.model.text_projection(self.model.text_model(input_ids=padded).pooler_output), dim=-1)


def _make_optimiser(model: Any, recipe: ClipRecipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

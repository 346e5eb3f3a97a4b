"""A small CLIP of the toy world: its tokenizer, its towers, their contrastive training, and its zero-shot figures."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD
from evc_fast.data.toy.actions import ACTIONS
from evc_fast.data.toy.faces import EXPRESSIONS
from evc_fast.data.toy.figures import SUBJECTS
from evc_fast.data.toy.places import PLACES
from evc_fast.data.toy.scenes import FRAMES, SIZE, Scene, draw_scene, locate_figure
from evc_fast.data.toy.sentences import CAPTIONS, EMOTION_WORDS, NOUNS, VERBS, Sentence, describe
from evc_fast.data.toy.world import ToyWorld
from evc_fast.data.video import read_frames

EMOTION_TEMPLATE = "a photo of a person feeling {}"
PART_TEMPLATE = "A photo of {}"
NUM_FRAMES = 16  # that a clip is sampled at, as captioning samples it

_SHIFT = 8  # pixels by which training frames are moved at most
_MAX_SCALE = 50.0  # of the cosines, CLIP's inverse temperature
# A place is seen at once; emotion and action are small in the picture.
_FACT_WEIGHTS = {"subject": 0.75, "action": 1.0, "emotion": 1.0, "place": 0.25}
_TEXT_BATCH, _TEXT_RATE = 64, 3e-3
_KEPT, _WHOLE_FROM = 26, 0.8  # patches of a picture that are looked at up to that share of the steps
_IN_PROCESS = 100  # variants up to which no processes are started
_HEAD_RADIUS, _BODY_RADIUS = 16.0, 20.0  # pixels
_PARTS_OF = {"subject": (0,), "action": (1,), "emotion": (0,)}  # 0 head, 1 body


@dataclass(frozen=True)
class ClipRecipe:
    """How the small CLIP is made.

    Both towers have `width`, `heads` and a projection to `width`; pictures are 96 pixels in patches of `patch`.
    variants: drawings of each training combination, of which `variant_frames` frames are looked at
    pictures: in a step
    """

    width: int = 96
    heads: int = 4
    image_layers: int = 4
    text_layers: int = 2
    patch: int = 12
    variants: int = 20
    variant_frames: int = 2
    pictures: int = 64
    steps: int = 2000
    text_steps: int = 400
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
    # Pairs of equal frequency are merged in the order of their ids, which are the same each time only for what is named
    # here: every byte, and its form at the end of a word.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[*alphabet, *(f"{character}</w>" for character in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
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
    clips: Sequence[Scene],
    recipe: ClipRecipe | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Any, Any]:
    """Trains a small CLIP for the training clips of a world: (CLIPModel in evaluation mode, tokenizer).

    The text tower comes first, and stays as it is: trained together from the start, prompts of one template, nearly one
    point at first, fall together before the pictures have anything to tell them apart by. The image tower is then
    trained contrastively: pictures against captions, where a caption is right for every picture of the batch of which
    it is true, and against the prompts that tell the values of one fact apart. The class token alone would take long to
    find the face; so the patches of the head and of the body choose among the same prompts, those for emotion and
    subject, or for the action, before the class token gathers what they know. The clips are few
    enough to be learnt by heart, and what is trained on their features would then learn to trust what no other clip
    has; so the combinations of subject, action and emotion that they show, and no other, are drawn in more colours,
    places and moments, and the clips themselves are left to the captioner.
    `progress(step, steps, loss)` is called after each step. The same recipe and number of threads give the same model.
    """
    recipe = recipe or ClipRecipe()
    pictures = Pictures.draw(clips, recipe)
    said = {scene.video_id: [*describe(scene), *prompts_of(scene)] for scene in dict.fromkeys(pictures.scenes)}
    tokenizer = make_tokenizer([sentence.text for row in said.values() for sentence in row])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = make_model(recipe, tokenizer).train()
        _warm_start(model, pictures.frames, recipe)
        _teach_texts(model, tokenizer, said, recipe.text_steps)
        train_image_tower(model, tokenizer, pictures, said, recipe, progress=progress)
    return model.eval(), tokenizer


def train_image_tower(
    model: Any,
    tokenizer: Any,
    pictures: Pictures,
    said: dict[str, list[Sentence]],
    recipe: ClipRecipe,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Trains the image tower against the texts as they are. said: video id -> what is true of it."""
    texts = [*dict.fromkeys(sentence.text for row in said.values() for sentence in row)]
    texts += [prompt for prompts in fact_prompts().values() for prompt in prompts]
    with torch.no_grad():
        parts = [encode_texts(model, tokenizer, texts[start : start + 256]) for start in range(0, len(texts), 256)]
    loss_of = _Loss(model, dict(zip(texts, torch.cat(parts), strict=True)))
    batches, optimiser, steps = _Batches(pictures, recipe), _make_optimiser(model, recipe), recipe.steps
    for step in range(steps):
        for group in optimiser.param_groups:
            warm = min(1.0, (step + 1) / (0.05 * steps))
            group["lr"] = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        loss = loss_of(batches.draw(said, whole=step > _WHOLE_FROM * steps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress is not None:
            progress(step + 1, steps, loss.item())


@dataclass(frozen=True)
class Pictures:
    """Frames to learn from: uint8 [n, S, S, 3], the scene of each, and where its head and hips are [n, 2, (x, y)]."""

    frames: Tensor
    scenes: list[Scene]
    places: Tensor

    @classmethod
    def draw(cls, clips: Sequence[Scene], recipe: ClipRecipe) -> Pictures:
        """The recipe's drawings of the combinations that `clips` show."""
        rows = vary(clips, recipe)
        # Rows of one drawing stand together.
        runs = [(scene, [index for _, index in run]) for scene, run in itertools.groupby(rows, key=lambda row: row[0])]
        if len(runs) > _IN_PROCESS:
            with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
                drawn = list(pool.map(_draw, runs, chunksize=16))
        else:
            drawn = list(map(_draw, runs))
        frames, places = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*drawn, strict=True))
        return cls(frames, [scene for scene, _ in rows], places)


def vary(clips: Sequence[Scene], recipe: ClipRecipe) -> list[tuple[Scene, int]]:
    """Scenes and frame numbers: the combinations of subject, action and emotion of `clips`, drawn otherwise."""
    random = np.random.default_rng((recipe.seed, 1))
    combinations = dict.fromkeys((scene.subject, scene.action, scene.emotion) for scene in clips)
    rows: list[tuple[Scene, int]] = []
    for subject, action, emotion in combinations:
        for _ in range(recipe.variants):
            number, place = len(rows), list(PLACES)[random.integers(len(PLACES))]
            # Beyond the numbers of the world's own clips.
            seed = (recipe.seed, 1_000_000 + number)
            scene = Scene(f"variant{number}", "train", subject, action, emotion, place, seed)
            rows += [(scene, int(index)) for index in random.choice(FRAMES, recipe.variant_frames, replace=False)]
    return rows


def _draw(run: tuple[Scene, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    scene, numbers = run
    return draw_scene(scene, only=numbers), locate_figure(scene)[numbers]


@dataclass(frozen=True)
class _Batch:
    """What one step sees.

    pixel_values: [n, 3, S, S]; facts: name -> labels [n]; parts: bool [n, 2, patches], head and body
    kept: int64 [n, p], the patches that are looked at; None: all
    true: [n, texts], 1 where the text is true of the picture, else 0
    """

    pixel_values: Tensor
    facts: dict[str, Tensor]
    parts: Tensor
    kept: Tensor | None
    texts: list[str]
    true: Tensor


class _Batches:
    """Random batches of augmented pictures."""

    def __init__(self, pictures: Pictures, recipe: ClipRecipe) -> None:
        self.recipe, self.pictures = recipe, pictures
        scenes = pictures.scenes
        self.labels = {k: torch.tensor([v.index(getattr(s, k)) for s in scenes]) for k, v in FACTS.items()}
        self._order: list[int] = []

    def draw(self, said: dict[str, list[Sentence]], *, whole: bool) -> _Batch:
        """The next pictures; where not `whole`, most of the background is left out, which saves half the time."""
        scenes, count = self.pictures.scenes, min(self.recipe.pictures, len(self.pictures.scenes))
        if len(self._order) < count:
            self._order = torch.randperm(len(scenes)).tolist()
        picked, self._order = self._order[:count], self._order[count:]
        pixel_values, places = self._augment(picked)
        texts: dict[str, Sentence] = {}
        for index in picked:
            rows = said[scenes[index].video_id]
            for choice in (*torch.randperm(CAPTIONS)[:2].tolist(), int(torch.randint(CAPTIONS, len(rows), ()))):
                texts.setdefault(rows[choice].text, rows[choice])
        true = [[sentence.is_true_of(scenes[index]) for sentence in texts.values()] for index in picked]
        parts = _patches_of(places, self.recipe.patch)
        kept = None if whole else (parts.sum(1) + torch.rand(parts.shape[::2])).topk(_KEPT, dim=1).indices
        return _Batch(
            pixel_values=pixel_values,
            facts={fact: labels[picked] for fact, labels in self.labels.items()},
            parts=parts,
            kept=kept,
            texts=list(texts),
            true=torch.tensor(true, dtype=torch.float32),
        )

    def _augment(self, picked: list[int]) -> tuple[Tensor, Tensor]:
        """Shifted, mirrored and tinted pictures, normalised as CLIP's, and where their figures are then."""
        mean, std = 255 * torch.tensor(CLIP_MEAN), 255 * torch.tensor(CLIP_STD)
        pixels = torch.arange(SIZE)
        values = torch.empty(len(picked), SIZE, SIZE, 3)
        places = self.pictures.places[picked]
        for row, index in enumerate(picked):
            dx, dy = torch.randint(-_SHIFT, _SHIFT + 1, (2,)).tolist()
            columns, lines = (pixels + dx).clamp(0, SIZE - 1), (pixels + dy).clamp(0, SIZE - 1)
            places[row] -= torch.tensor([dx, dy])
            if torch.rand(()) < 0.5:
                columns = columns.flip(0)
                places[row, :, 0] = SIZE - places[row, :, 0]
            gain, tint = 1 + 0.2 * (2 * torch.rand(3) - 1), 0.2 * (2 * torch.rand(3) - 1)
            values[row] = (self.pictures.frames[index][lines][:, columns].float() - mean) * (gain / std) + tint
        return values.permute(0, 3, 1, 2).contiguous(), places


def _patches_of(places: Tensor, patch: int) -> Tensor:
    """The patches of the head and of the body: places [n, 2, 2] in pixels -> bool [n, 2, patches]."""
    centres = torch.arange(SIZE // patch) * patch + patch / 2
    x, y = centres.repeat(len(centres)), centres.repeat_interleave(len(centres))
    distance = ((torch.stack([x, y], -1) - places[:, :, None]) ** 2).sum(-1).sqrt()
    parts = distance < torch.tensor([_HEAD_RADIUS, _BODY_RADIUS])[:, None]
    return parts | (distance == distance.amin(-1, keepdim=True))  # at least the nearest one


class _Loss:
    """The contrastive loss of one batch."""

    def __init__(self, model: Any, features: dict[str, Tensor]) -> None:
        self.model, self.features = model, features
        self.prompts = {fact: torch.stack([features[p] for p in prompts]) for fact, prompts in fact_prompts().items()}

    def __call__(self, batch: _Batch) -> Tensor:
        images, tokens, parts = self._encode_images(batch)
        scale = self.model.logit_scale.exp().clamp(max=_MAX_SCALE)
        logits = scale * images @ torch.stack([self.features[text] for text in batch.texts]).T
        # Each direction: the mean over all that are right.
        right = batch.true
        of_texts = -(right * logits.log_softmax(0)).sum(0) / right.sum(0)
        of_images = -(right * logits.log_softmax(1)).sum(1) / right.sum(1).clamp_min(1)
        loss = 0.5 * (of_texts.mean() + of_images.mean())
        for fact, prompts in self.prompts.items():
            choices = prompts.T
            loss = loss + _FACT_WEIGHTS[fact] * F.cross_entropy(scale * images @ choices, batch.facts[fact])
            for part in _PARTS_OF.get(fact, ()):
                weights = parts[:, part].float()
                local = (scale * tokens @ choices).log_softmax(-1)
                local = -local.gather(2, batch.facts[fact][:, None, None].expand(-1, local.shape[1], 1))[..., 0]
                loss = loss + _FACT_WEIGHTS[fact] * ((local * weights).sum(1) / weights.sum(1)).mean()
        return loss

    def _encode_images(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures' features [n, D], the patches' before the last layer [n, p, D], and their parts."""
        tower, project = self.model.vision_model, self.model.visual_projection
        tokens = tower.embeddings(batch.pixel_values)
        parts = batch.parts
        if batch.kept is not None:
            rows = torch.arange(len(tokens))[:, None]
            tokens = torch.cat([tokens[:, :1], tokens[rows, 1 + batch.kept]], 1)
            parts = parts[rows[:, None], torch.arange(2)[:, None], batch.kept[:, None]]
        tokens = tower.pre_layrnorm(tokens)
        for layer in tower.encoder.layers:
            before, tokens = tokens, layer(tokens, attention_mask=None)
        whole = project(tower.post_layernorm(tokens[:, 0]))
        patches = project(tower.post_layernorm(before[:, 1:]))
        return F.normalize(whole, dim=-1), F.normalize(patches, dim=-1), parts


def _teach_texts(model: Any, tokenizer: Any, sentences: dict[str, list[Sentence]], steps: int) -> None:
    """Trains the text tower, before pictures are there: each fact gets a direction at random, and a text is drawn to
    the sum of those that it states."""
    codes = torch.linalg.qr(torch.randn(model.config.projection_dim, sum(map(len, FACTS.values())))).Q.T
    columns = {key: index for index, key in enumerate((f, v) for f, values in FACTS.items() for v in values)}

    def target(sentence: Sentence) -> Tensor:
        stated = [(fact, getattr(sentence, fact)) for fact in ("action", "emotion", "place")]
        target = codes[[columns[key] for key in stated if key[1] is not None]].sum(0)
        if len(sentence.subjects) < len(SUBJECTS):
            target = target + codes[[columns["subject", name] for name in sentence.subjects]].mean(0)
        return F.normalize(target, dim=0)

    texts = {sentence.text: sentence for rows in sentences.values() for sentence in rows}
    texts = list(texts.values())
    parameters = [*model.text_model.parameters(), *model.text_projection.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=_TEXT_RATE, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _TEXT_RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        picked = [texts[index] for index in torch.randint(len(texts), (_TEXT_BATCH,)).tolist()]
        features = encode_texts(model, tokenizer, [sentence.text for sentence in picked])
        loss = (features - torch.stack([target(sentence) for sentence in picked])).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def encode_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Normalised text features [n, D], with gradients."""
    ids = tokenizer(list(texts))["input_ids"]
    longest, end = max(map(len, ids)), tokenizer.eos_token_id
    padded = torch.tensor([row + [end] * (longest - len(row)) for row in ids])
    return F.normalize(model.text_projection(model.text_model(input_ids=padded).pooler_output), dim=-1)


@torch.no_grad()
def _warm_start(model: Any, frames: Tensor, recipe: ClipRecipe) -> None:
    """Starts the image tower where it sees detail and position, which random weights take most of the time to find.

    Patches are projected on their principal components, whitened, so that edges count as much as colours; positions
    are sines and cosines of row and column; queries equal keys, so that a patch looks at those near and like it.
    """
    tower, size, width = model.vision_model, recipe.patch, recipe.width
    mean, std = 255 * torch.tensor(CLIP_MEAN), 255 * torch.tensor(CLIP_STD)
    picked = frames[torch.randint(len(frames), (512,))]
    patches = ((picked.float() - mean) / std).permute(0, 3, 1, 2).unfold(2, size, size).unfold(3, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)  # [n, 3 size^2], as the convolution reads them
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    whitened = vectors[:, -width:] / (values[-width:] + 0.05 * values[-width:].mean()).sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    tower.embeddings.patch_embedding.weight.copy_((whitened @ rotation).T.unflatten(1, (3, size, size)))

    side = SIZE // size
    angles = torch.arange(side)[:, None] * math.pi / side * torch.linspace(0.5, side / 4, width // 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], 2)
    tower.embeddings.position_embedding.weight[1:].copy_(grid.flatten(0, 1))
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        torch.nn.init.normal_(attention.q_proj.weight, std=width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def _make_optimiser(model: Any, recipe: ClipRecipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

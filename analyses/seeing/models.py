"""The models that the arms begin with: a language model and its expert, a vision encoder, and the vision-language model of the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from analyses.controls import planted_tokenizer
from analyses.scoring import quiet
from analyses.seeing.learning import fit, taught, train
from analyses.seeing.pictures import PICTURE, PIECES, Digits, aloud, handwritten, pictured, stream, written_sums
from analyses.tasks import Question
from surgery.anatomy import Anatomy
from surgery.borrowing import own_draws
from surgery.model import Model, changed_parameters
from surgery.sites import Site
from surgery.weights import Delta, Origin, Weights, linear_sites


@dataclass(frozen=True)
class Course:
    """How large the models are and how long they learn.

    width, layers: of the llama. short, long: fewest and most terms of a sum, while the base learns and of the task (the expert learns both).
    base, expert, encoder, reading: optimizer steps of the four that are made; their batches have `batch_size` fresh items.
    examples: pictured sums that the arms train on, for `steps` steps of `batch_size`, at the peak learning rate `lr`.
    develop: pictured sums on which the share of a merge without training is chosen.
    """

    width: int = 96
    layers: int = 3
    short: tuple[int, int] = (2, 3)
    long: tuple[int, int] = (3, 4)
    base: int = 250
    expert: int = 300
    encoder: int = 200
    reading: int = 150
    steps: int = 80
    examples: int = 256
    batch_size: int = 64
    lr: float = 1e-3
    develop: int = 128

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        wrong = next((name for name, value in numbers.items() if value < 1), None)
        if wrong or self.width % 8:
            raise ValueError(
                f"{wrong or 'width'}={numbers[wrong or 'width']}: all counts are at least 1, and the width, of four heads, a multiple of 8."
            )

    def shortened(self, share: float) -> Course:
        """The same course with a share, in (0, 1], of every training's steps, at least one."""
        if not 0 < share <= 1:
            raise ValueError(f"share {share}: a course is shortened to a part of it, in (0, 1].")
        lessons = ("base", "expert", "encoder", "reading", "steps")
        return replace(self, **{name: max(1, round(share * getattr(self, name))) for name in lessons})


@dataclass(frozen=True)
class World:
    """What the arms of one seed begin with. host: the vision-language model to be tuned; D: from its tower to the expert's, at the
    attention and MLP matrices. encoder: share of the held-out pictures the vision encoder names."""

    seed: int
    digits: Digits
    base: Model
    expert: Model
    host: Model
    encoder: float

    @property
    def prior(self) -> Delta:
        """D, ``expert - host``: both stay as they are, so it may be read at any time."""
        return Between(self.expert.weights, self.host.weights)


class Between(Delta):
    """From a vision-language model's tower to a language model of its shape, at the attention and MLP matrices; read when asked for."""

    def __init__(self, expert: Weights, host: Weights):
        self._expert, self._host = expert, host
        self._shapes = {site: expert.shapes()[site] for site in linear_sites(expert)}
        unlike = [s for s, shape in self._shapes.items() if host.shapes().get(s) != shape]
        if unlike:
            raise ValueError(
                f"The expert is not of the tower's shape: {len(unlike)} sites differ, first {', '.join(map(str, unlike[:3]))}."
            )

    @property
    def anatomy(self) -> Anatomy:
        return self._expert.anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def origins(self) -> frozenset[Origin]:
        return self._expert.origins()

    def _read(self, site: Site, rows: slice) -> Tensor:
        return self._expert.rows(site, rows).float() - self._host.rows(site, rows).float()


def world(seed: int, course: Course = Course()) -> World:
    """Train the models that the arms begin with, on the CPU. The random state of the process is left as it was."""
    with own_draws():
        digits, tokenizer = handwritten(), planted_tokenizer("+", "-", "=", PICTURE)
        base, expert = _speakers(tokenizer, seed, course)
        torch.manual_seed(seed)
        module: Any = _llava(tokenizer, course)
        share = _learn_digits(module.model.vision_tower, digits, seed, course)
        module.model.language_model.load_state_dict(base.module.model.state_dict())
        host = Model(module, tokenizer)
        module.model.vision_tower.requires_grad_(False)
        rows = taught(host, _reading(course, digits, seed))
        fit(host, rows, course.reading, seed, batch_size=course.batch_size, lr=2e-3, pixels=digits.pixels)
        module.model.multi_modal_projector.requires_grad_(False)
    return World(seed, digits, base, expert, host, share)


def _speakers(tokenizer: Any, seed: int, course: Course) -> tuple[Model, Model]:
    """The base, which learns short sums, and the expert, which is the base tuned on sums of every length."""
    torch.manual_seed(seed)
    base = Model(_llama(tokenizer, course), tokenizer)
    sums = _mixture(course.base * course.batch_size, seed=stream(seed, "base"), terms=course.short)
    fit(base, taught(base, sums), course.base, seed, batch_size=course.batch_size, lr=3e-3)
    expert, every = duplicate(base), (course.short[0], course.long[1])
    sums = _mixture(course.expert * course.batch_size, seed=stream(seed, "expert"), terms=every)
    fit(expert, taught(expert, sums), course.expert, seed, batch_size=course.batch_size, lr=2e-3)
    return base, expert


def duplicate(model: Model) -> Model:
    """The same model again, to be changed by itself."""
    return Model(copy.deepcopy(model.module), model.tokenizer, None, model.markers)


def holding(model: Model, weights: Weights) -> Model:
    """A copy of a model that holds other weights."""
    new = duplicate(model)
    own = dict(new.module.named_parameters())
    for name, tensor in changed_parameters(weights, new).items():
        own[name].data.copy_(tensor)
    return new


def _llama(tokenizer: Any, course: Course) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(_text_config(tokenizer, course))


def _text_config(tokenizer: Any, course: Course) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=course.width,
        intermediate_size=8 * course.width // 3,
        num_hidden_layers=course.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=course.width // 4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _llava(tokenizer: Any, course: Course) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, projection_dim=48, num_hidden_layers=2, num_attention_heads=2,
        num_channels=1, image_size=8, patch_size=4, initializer_range=0.1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=_text_config(tokenizer, course),
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids(PICTURE),
            image_seq_length=PIECES,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )


def _mixture(count: int, *, seed: int, terms: tuple[int, int]) -> list[Question]:
    """Three sums to work out for one to read aloud."""
    found = written_sums(count, seed=seed, terms=terms)
    return [q if i % 4 else aloud([q])[0] for i, q in enumerate(found)]


def _reading(course: Course, digits: Digits, seed: int) -> list[Question]:
    """Three pictured expressions to read aloud for one short sum in text."""
    count = course.reading * course.batch_size
    text = _mixture(count // 4, seed=stream(seed, "reading, text"), terms=course.short)
    long = written_sums(count - len(text), seed=stream(seed, "reading"), terms=(course.short[0], course.long[1]))
    return [*pictured(aloud(long), digits, seed=stream(seed, "reading, pictures")), *text]


class _Naming(nn.Module):
    """A vision encoder with a layer that names the digit, from the pieces that a llava would be shown."""

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower, self.name = tower, nn.Linear(PIECES * width, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        pieces = self.tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        logits = self.name(pieces.flatten(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def _learn_digits(tower: nn.Module, digits: Digits, seed: int, course: Course) -> float:
    """Train a vision encoder to name the training pictures, in place; the share of the held-out ones it then names."""
    naming = _Naming(tower, tower.config.hidden_size)  # type: ignore[union-attr, arg-type]
    learned = [i for i, side in enumerate(digits.sides) if side == "train"]
    held = [i for i, side in enumerate(digits.sides) if side == "test"]
    rows = [{"pixel_values": digits.pixels[i], "labels": int(digits.labels[i])} for i in learned]
    train(naming, rows, None, course.encoder, seed, batch_size=course.batch_size, lr=2e-3)
    with quiet(naming):
        said = naming(digits.pixels[held])["logits"].argmax(-1)
    return float((said == digits.labels[held]).float().mean())

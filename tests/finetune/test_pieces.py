"""A backward pass in pieces gives the gradients of one in a whole, and the dense ones are never there together."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analyses.tasks import chained_sums
from finetune.examples import Collate, examples, rows_of
from finetune.objectives import nll
from finetune.pieces import are_pieces, cut, in_pieces
from finetune.predictions import predict
from finetune.retention import Replay
from finetune.rules import DRIFT
from surgery.model import Model
from tests.families import tiny
from tests.hosted import arguments, model, prior, stepper, trainer_of


class Alive(TorchDispatchMode):
    """How many tensors of the shapes of some weights, made within, are alive together at most."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self._shapes = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
        self._own = {p.untyped_storage().data_ptr() for p in weights}
        self._there: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self._shapes:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._own:
                    self._there[storage.data_ptr()] = weakref.ref(storage)
        self._there = {at: ref for at, ref in self._there.items() if ref() is not None}
        self.most = max(self.most, len(self._there))
        return made


def told(m: Model, count: int = 6) -> list[Any]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in chained_sums(count, seed=5)]


def gradients(family: str, pieces: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    m = Model(*tiny(family, dtype=dtype))
    batch = Collate(m.pad_id)(rows_of(examples(told(m))))
    nll(predict(m.module, batch, pieces=pieces)).backward()
    return {name: p.grad for name, p in m.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt-neox", "gemma2", "mixtral"])
def test_gradients_are_those_of_one_pass(family: str) -> None:
    whole, apart = (gradients(family, pieces) for pieces in (False, True))
    assert whole.keys() == apart.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(
            apart[name], grad, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_what_is_behind_goes_backward_once_all_of_it_is_known() -> None:
    w, seen = nn.Parameter(torch.tensor([2.0, 3.0])), []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    square, constant = w.square(), torch.ones(2)
    first, second, third = cut([square, w * 5, constant])
    assert third is constant
    (first * second * w).sum().backward()
    # d/dw of w^2 * 5w * w is 20 w^3: 5 w^3 through the last factor, then the rest together
    torch.testing.assert_close(seen[-1], 20 * w.detach() ** 3)
    torch.testing.assert_close(seen[0], 5 * w.detach() ** 3)
    assert len(seen) == 2
    _, used = cut([w * 7, w * 11])
    w.grad = None
    used.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [11.0, 11.0]


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_stays(backward: bool) -> None:
    """Neither after the pass nor where none comes: what is cut goes with the last who holds it, without a collection of garbage."""
    w = nn.Parameter(torch.tensor([2.0, 3.0]))
    before = [w * 5, w * 7]
    after = cut(before)
    loss = (after[0] * after[1]).sum()
    if backward:
        loss.backward()
    there = [weakref.ref(tensor) for tensor in (*before, *after, loss)]
    del before, after, loss
    assert not [ref for ref in there if ref() is not None]


def test_a_trainer_says_whether_there_are_pieces() -> None:
    assert not are_pieces()
    with in_pieces(True):
        assert are_pieces()
        with in_pieces(False):
            assert not are_pieces()
        assert are_pieces()
    assert not are_pieces()


@contextmanager
def counted(trainer: Any) -> Iterator[Alive]:
    """The weights' dense gradients that are alive together in the trainer's backward passes."""
    mode = Alive([p for p in trainer.model.parameters() if p.requires_grad])
    real = trainer.accelerator.backward

    def backward(loss: Tensor, **options: Any) -> None:
        with mode:
            real(loss, **options)

    trainer.accelerator.backward = backward
    yield mode


@pytest.mark.parametrize("kind", ["prompt", "term", "hooked"])
def test_dense_gradients_are_not_there_together(kind: str, tmp_path: Path) -> None:
    """LIFT takes each as it comes: also where rows share a prompt, and where a term goes through the model as well. Where somebody looks at
    whole gradients they come whole."""
    m = model("lift")
    lift = stepper("lift", m)
    count = sum(p.requires_grad for p in m.module.parameters())
    terms = [Replay(told(m), batch_size=3)] if kind == "term" else []
    arrived: list[float] = []
    if kind == "hooked":
        next(p for p in m.module.parameters() if p.requires_grad).register_hook(lambda grad: arrived.append(0.0))
    trainer = trainer_of(m, arguments(tmp_path, max_steps=2), lift, terms=terms)
    with counted(trainer) as alive:
        trainer.train()
    if kind == "hooked":
        assert alive.most > count / 2
        assert len(arrived) == 4  # micro-batches
    else:
        assert alive.most <= 4
        assert not are_pieces()


def test_the_published_hooks_bend_a_gradient_once(tmp_path: Path) -> None:
    """DRIFT as released, by hooks in the backward pass: those of a step that is whole."""
    found = []
    for pieces in (True, False):
        m = model("lift")
        drift = DRIFT(prior(), m, legacy=True)
        trainer = trainer_of(m, arguments(tmp_path, max_steps=1), stepper("lift", m), callbacks=[drift])
        if not pieces:
            trainer._may_cut = lambda _: False
        trainer.train()
        found.append({name: p.detach().clone() for name, p in m.module.named_parameters()})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_published_hooks_that_bend_nothing_leave_the_pieces_as_they_are(family: str, tmp_path: Path) -> None:
    """Without strength the bits are those of plain tuning: bf16 gradients that are added up before LIFT has them are rounded."""
    found = []
    for pulls in (False, True):
        m = model("bf16", family)
        callbacks = [DRIFT(prior(family), m, 0.0, legacy=True)] if pulls else []
        trainer = trainer_of(
            m,
            arguments(tmp_path, max_steps=2),
            stepper("lift", m),
            terms=[Replay(told(m), batch_size=3)],
            callbacks=callbacks,
        )
        trainer.train()
        found.append({name: p.detach().clone() for name, p in m.module.named_parameters()})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())

"""Rows that have ended leave the batch also where a model is steered, recorded, mixed or has parts silenced: whoever follows the passes does not
notice."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import surgery.decoding as decoding
from probes.attribution import ablated
from probes.mixing import mixed
from probes.recorder import recording
from probes.steering import steered
from surgery.edits import Scale
from surgery.model import Model
from surgery.transcript import Markers
from surgery.weights import apply
from tests.families import characters, tiny

QUESTIONS = [f"a question {'x' * (i % 7)}" for i in range(8)]
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3", "mixtral")


def direction() -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(0))


def open_each(model: Model, stack: ExitStack) -> Any:
    """Every way to follow the passes at once, each row its own strength; the recording among them."""
    tuned = apply(Scale(0.5), model.weights, at="*.attn.o")
    strengths = torch.linspace(-3, 3, len(QUESTIONS)).tolist()
    stack.enter_context(mixed(model, tuned, torch.linspace(0, 1, len(QUESTIONS))))
    stack.enter_context(ablated(model, "1.attn.o.h1"))
    stack.enter_context(steered(model, direction(), strength=strengths, at="1.resid", over="completion"))
    stack.enter_context(steered(model, direction(), how="ablate", at="2.resid", over=r"completion~/[a-m]/"))
    stack.enter_context(steered(model, direction(), strength=3.0, at="1.attn.out", over=("thinking", "answer[9:]")))
    return stack.enter_context(recording(model, at="2.resid", over="completion"))


def written(model: Model, opened: Callable[[Model, ExitStack], Any]) -> tuple[Any, Any, list[int]]:
    """What is generated, what was recorded of it, and how many rows each pass had."""
    sizes: list[int] = []
    backbone: Any = type(model.module.base_model)
    plain = backbone.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(args[0] if args else kwargs["input_ids"]))
        return plain(self, *args, **kwargs)

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        seen = opened(model, stack)
        patch.setattr(backbone, "forward", counted)
        runs = model.generate(QUESTIONS, samples=3, temperature=50.0, max_new_tokens=40)
        return [t.ids for t in runs], seen.of(runs), sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_who_follows_the_passes_does_not_notice_that_rows_leave(family: str) -> None:
    module, tokenizer = tiny(family)
    marks = Markers("e", "t")  # of one character, so that chance writes them
    model = Model(module, tokenizer if family != "mixtral" else characters(), markers=marks)
    told, acts, sizes = written(model, open_each)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_STRETCH", 1000)
        expected, all_acts, all_sizes = written(model, open_each)
    assert told == expected
    assert torch.equal(acts.transcript, all_acts.transcript)
    assert torch.equal(acts.position, all_acts.position)
    torch.testing.assert_close(acts["2.resid"], all_acts["2.resid"], rtol=1e-4, atol=1e-4)
    assert min(sizes[-4:]) < max(sizes)  # some left
    assert sum(sizes) < sum(all_sizes)


def test_a_hook_that_does_not_ask_who_the_rows_are_keeps_them_all() -> None:
    model = Model(*tiny("llama"))

    def with_another(model: Model, stack: ExitStack) -> Any:
        handle = model.module.get_submodule("model.layers.1").register_forward_hook(lambda *_: None)
        stack.callback(handle.remove)
        return open_each(model, stack)

    told, _, sizes = written(model, with_another)
    assert told == written(model, open_each)[0]
    assert min(sizes[-4:]) == max(sizes)

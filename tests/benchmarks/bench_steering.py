"""What steering costs: greedy decoding with one direction added, beside the same without, beside nnsight and TransformerLens doing it to the
same weights; and mixing two models beside running both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analyses.tasks import chained_sums
from probes.mixing import mixed
from probes.steering import Steering, steered
from surgery.edits import Scale
from surgery.model import Model
from surgery.weights import apply

STEERED = 1.03
LENGTH = 32
OPTIONS: dict[str, Any] = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}


def run(folder: str | Path, rounds: int = 7) -> list[Any]:
    """Rows for the model in `folder`, in fp32 on the CPU."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return [*decoding_rows(model, rounds), *peer_rows(model, rounds), *mixing_rows(model, rounds)]


def medians(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each arm, one after the other in every round, so that a slow minute of the machine hits all."""
    for call in arms.values():
        call()
    times = [{name: _timed(call) for name, call in arms.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in arms}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def direction(model: Model) -> torch.Tensor:
    return torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(0))


def decoding_rows(model: Model, rounds: int) -> list[dict[str, Any]]:
    """A batch of eight, answered to the end of the cap whether or not an answer ends before."""
    asked = [q.question for q in chained_sums(8, seed=0)]
    middle, units = f"{model.anatomy.n_layers // 2}.resid", "raw"

    def answer(*steerings: Steering) -> Callable[[], object]:
        def call() -> object:
            if not steerings:
                return model.generate(asked, max_new_tokens=LENGTH)
            with steered(model, list(steerings)):
                return model.generate(asked, max_new_tokens=LENGTH)

        return call

    tiny = 1e-6  # so that the same tokens come: what is timed is the steering, not another answer
    one = Steering(direction(model), tiny, at=middle, over="completion", units=units)
    thinking = Steering(direction(model), tiny, at=middle, over="thinking", units=units)
    every = Steering(direction(model), tiny, at="*.resid", over="completion", units=units)
    each = Steering(direction(model), [tiny * i for i in range(8)], at=middle, over="completion", units=units)
    took = medians(
        {"plain": answer(), "one": answer(one), "thinking": answer(thinking), "every": answer(every), "each": answer(each)},
        rounds,
    )  # fmt: skip
    note = f"8 questions, up to {LENGTH} tokens each, fp32; median of {rounds}"
    return [
        row(f"decoding steered at {middle} over the completion against plain (s)", took["one"], took["plain"], STEERED, note),
        row(f"decoding steered at {middle} over the thinking against plain (s)", took["thinking"], took["plain"], STEERED, note),
        row("decoding steered at every stream against plain (s)", took["every"], took["plain"], None, note),
        row(f"decoding steered at {middle}, each row its strength, against plain (s)", took["each"], took["plain"], None, note),
    ]  # fmt: skip


def peer_rows(model: Model, rounds: int) -> list[dict[str, Any]]:
    """One question: all three add the same vector to the stream entering the middle block, at every token."""
    ids = torch.tensor([model.prompt_ids(chained_sums(1, seed=0)[0].question)])
    layer = model.anatomy.n_layers // 2
    vector = direction(model)

    def ours() -> list[int]:
        with steered(model, vector, strength=1.0, at=f"{layer}.resid", over="all", units="raw"):
            return _generated(model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS), ids)

    def plain() -> list[int]:
        return _generated(model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS), ids)

    arms: dict[str, Callable[[], Any]] = {"plain": plain, "ours": ours}
    said = {"ours": ours()}
    for name, peer in (
        ("nnsight", _nnsight(model, ids, layer, vector)),
        ("TransformerLens", _lens(model, ids, layer, vector)),
    ):
        arms[name], said[name] = peer, peer()
    took = medians(arms, rounds)
    rows = []
    for name in ("nnsight", "TransformerLens"):
        # TransformerLens goes on after an end of sequence, ours and nnsight are told to write something else there
        ended = [i for i, token in enumerate(said[name]) if token == model.tokenizer.eos_token_id]
        until = ended[0] if ended else len(said[name])
        same = sum(a == b for a, b in zip(said["ours"][:until], said[name][:until], strict=True))
        note = f"1 question, {LENGTH} tokens, {same} of {until} up to an end of sequence the same; median of {rounds}"
        rows.append(row(f"decoding steered at {layer}.resid against {name} (s)", took["ours"], took[name], None, note))
    rows.append(
        row(f"decoding steered at {layer}.resid against plain, one question (s)", took["ours"], took["plain"], None, "")
    )
    return rows


def _generated(out: torch.Tensor, ids: torch.Tensor) -> list[int]:
    return out[0, ids.shape[1] :].tolist()


def _nnsight(model: Model, ids: torch.Tensor, layer: int, vector: torch.Tensor) -> Callable[[], list[int]]:
    window: Any = model.nnsight()
    block = window.get(f"{model.anatomy.blocks}.{layer}")

    def call() -> list[int]:
        with window.generate(ids, **OPTIONS) as tracer:
            for _ in tracer.iter[:LENGTH]:
                block.input = block.input + vector
            out = tracer.result.save()
        return _generated(out, ids)

    return call


def _lens(model: Model, ids: torch.Tensor, layer: int, vector: torch.Tensor) -> Callable[[], list[int]]:
    def add(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return stream + vector

    bridge: Any = model.bridge()

    @torch.no_grad()
    def call() -> list[int]:
        with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", add)]):
            out = bridge.generate(
                ids, max_new_tokens=LENGTH, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
            )
        return _generated(out, ids)

    return call


def mixing_rows(model: Model, rounds: int) -> list[dict[str, Any]]:
    """Two models at once against one after the other, which is what they cannot cost less than."""
    asked = [q.question for q in chained_sums(8, seed=0)]
    other = apply(Scale(1.001), model.weights, "*.mlp.down")

    def both() -> None:
        for weights in (model.weights, other):
            with model.installed(weights):
                model.generate(asked, max_new_tokens=LENGTH)

    def together() -> None:
        with mixed(model, other, 0.5):
            model.generate(asked, max_new_tokens=LENGTH)

    took = medians({"both": both, "mixed": together}, rounds)
    note = f"8 questions, up to {LENGTH} tokens each, the second model as weights of the first; median of {rounds}"
    return [row("two models mixed against one after the other (s)", took["mixed"], took["both"], None, note)]


def row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}

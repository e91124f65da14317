"""Direction, head ranking and edit beside the published algorithm restated literally, on the same answers with the published recipe.

Each side is a fresh process that has the model loaded and reads one answer after another. What a bare forward pass over the same answers
takes in memory is taken off both sides: it is the model's, and neither algorithm's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import measure

ANSWERS, HEADS = 8, 0.04
SHORT, LONG = 300, 500  # thresholds; the answers are of 240 and 600 tokens
TIME, MEMORY = 1 / 4, 1 / 20
_HERE = "tests.benchmarks.bench_thinkedit"


def run(folder: str | Path, repeats: int = 3) -> list[measure.Row]:
    """Rows for the model in ``folder``, in float32 on the CPU: the whole in seconds, memory beyond a forward pass, heads that differ."""
    arguments = {"folder": str(folder)}
    ours, peer = measure.beside(f"{_HERE}:ours", f"{_HERE}:peer", arguments, repeats)
    plain = [measure.once(f"{_HERE}:bare", arguments) for _ in range(repeats)]
    bare, passing = (statistics.median(getattr(run, name) for run in plain) for name in ("rise", "seconds"))
    (row,) = measure.rows(
        "direction, heads and edit", ours, peer, seconds=TIME, peak=None, note=f"{2 * ANSWERS} answers"
    )
    longer = [statistics.median(r.seconds for r in side) - passing for side in (ours, peer)]
    above = [max(0.0, statistics.median(r.rise for r in side) - bare) / 2**20 for side in (ours, peer)]
    lists = [job(str(folder))() for job in (ours_job, peer_job)]
    differ = len(set(lists[0]) ^ set(lists[1]))
    return [
        row,
        measure.Row(
            name="direction, heads and edit: time beyond a forward pass",
            ours=f"{longer[0]:.2f} s",
            peer=f"{longer[1]:.2f} s",
            ratio=longer[0] / longer[1] if longer[1] > 0 else float("nan"),
            limit=None,
            note=f"reading every answer once takes {passing:.2f} s; short ones are read twice, for the direction and for the heads",
        ),
        measure.Row(
            name="direction, heads and edit: memory beyond a forward pass",
            ours=f"{above[0]:.1f} MiB",
            peer=f"{above[1]:.1f} MiB",
            ratio=above[0] / above[1] if above[1] else float("nan"),
            limit=MEMORY,
            note=f"a forward pass takes {bare / 2**20:.0f} MiB",
        ),
        measure.Row(
            name="direction, heads and edit: heads that differ",
            ours=float(len(lists[0])),
            peer=float(len(lists[1])),
            ratio=float(differ),
            limit=0.0,
            note="of the top 4 %",
        ),
    ]


def answers(folder: str):
    """The model, and answers of two lengths to each of some questions."""
    from analyses.general_text import GENERAL_TEXT
    from surgery.model import Model

    model = Model.load(folder, device="cpu", dtype="float32")
    told = []
    for i in range(ANSWERS):
        ids = [t for text in GENERAL_TEXT[8 * i % 32 : 8 * i % 32 + 9] for t in model.tokenizer(text)["input_ids"]]
        for count in (240, 600):
            words = model.tokenizer.decode(ids[i : i + count])
            told.append(model.transcript(f"Tell me about number {i}.", f"<think>{words}</think>{i}"))
    return model, told


def ours_job(folder: str) -> Callable[[], list[tuple[int, int]]]:
    from dataclasses import replace

    from analyses.thinkedit import PAPER, Found, rank_heads
    from probes.directions import length_direction
    from surgery.weights import apply

    model, told = answers(folder)
    recipe = replace(PAPER, share=HEADS, short=SHORT, long=LONG)

    def job() -> list[tuple[int, int]]:
        direction = length_direction(model, told, how="thresholds", short=SHORT, long=LONG, batch_size=1)
        found = Found(direction, rank_heads(model, direction, told, recipe, batch_size=1), recipe)
        point = apply(found.edit(), model.weights, at=found.heads())
        for site in point.changed_from(model.weights):
            _ = point[site]
        return [(s.layer or 0, s.head or 0) for s in found.heads()]

    return job


def peer_job(folder: str) -> Callable[[], list[tuple[int, int]]]:
    from tests.oracles import thinkedit as oracle

    model, told = answers(folder)
    module, anatomy = model.module, model.anatomy
    examples = [(t.ids, *t.spans["thinking"]) for t in told]

    def job() -> list[tuple[int, int]]:
        v = oracle.direction(module, examples, short=SHORT, long=LONG)
        scores = oracle.scores(module, examples, v, short=SHORT)
        heads = oracle.top(scores, max(1, round(HEADS * anatomy.n_layers * anatomy.n_heads)))
        for layer in {layer for layer, _ in heads}:
            W = module.model.layers[layer].self_attn.o_proj.weight.detach()
            oracle.edited(W, v[layer], [h for at, h in heads if at == layer], anatomy.head_dim)
        return heads

    return job


def ours(folder: str) -> Callable[[], object]:
    """A job of `measure`."""
    return ours_job(folder)


def peer(folder: str) -> Callable[[], object]:
    """A job of `measure`."""
    return peer_job(folder)


def bare(folder: str) -> Callable[[], object]:
    """A job of `measure`: the same answers, read and nothing kept."""
    import torch

    model, told = answers(folder)

    def job() -> None:
        with torch.no_grad():
            for t in told:
                model.module.base_model(input_ids=torch.tensor([t.ids]), use_cache=False)

    return job

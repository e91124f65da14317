"""Probes of 30 layers and 3 spans on 2,000 transcripts with all their controls, after capture; and the same protocol by plain grid search.

The activations are drawn, not captured: rows of the default model's width whose spectrum falls as a stream's does, with a label that can
be read at some layers. What fitting costs depends on their shape and conditioning alone.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from probes.activations import Activations
from probes.fitting import INNER, PENALTIES
from probes.held_out import auc, deal, units
from probes.linear import probe_rows
from surgery.sites import Site
from tests.benchmarks.measure import Row

LAYERS, SPANS, TRANSCRIPTS, SAMPLES, WIDTH = 30, ("prompt", "thinking", "answer"), 2000, 4, 576
SECONDS = 180.0
PEER_LAYERS = 2  # the peer fits so many layers of one span; its time for all is in proportion


def run(layers: int = LAYERS, transcripts: int = TRANSCRIPTS, width: int = WIDTH) -> list[Row]:
    """Rows {name, ours, peer, ratio, limit, note}. The first's peer is the three minutes allowed."""
    acts, labels, questions, lengths = drawn(layers, transcripts, width, seed=0)
    twin = drawn(layers, transcripts, width, seed=1)[0]
    probe_rows(*drawn(1, 60, 8, seed=2)[:3], draws=10)  # the first fit pays for imports
    seconds, table = timed(lambda: probe_rows(acts, labels, questions, lengths=lengths, twin=twin))
    cells = layers * len(SPANS)
    best = max(row.value for row in table.rows)
    note = (
        f"{cells} probes of {transcripts} rows of width {width}, each with {table.about['shuffles']} shuffles, an untrained twin and "
        f"the length; {torch.get_num_threads()} threads; best AUC {best:.3f}"
    )
    limit = SECONDS * cells / (LAYERS * len(SPANS))
    made = Row(
        name="probes over layers and spans, with controls",
        ours=f"{seconds:.0f} s",
        peer=f"{limit:.0f} s allowed",
        ratio=seconds / limit,
        limit=1.0,
        note=note,
    )
    few = Activations(
        {Site(i, "resid"): acts.values[Site(i, "resid")] for i in range(PEER_LAYERS)},
        acts.transcript,
        acts.position,
        acts.span,
        acts.over,
    )
    one = few.where(few.span == 0)
    ours, found = timed(lambda: probe_rows(one, labels, questions, shuffles=0, draws=2))
    peer, values = timed(lambda: [grid_search(X.numpy(), labels, questions) for X in one.values.values()])
    apart = max(abs(row.value - value) for row, value in zip(found.rows, values, strict=True))
    return [
        made,
        Row(
            name=f"{PEER_LAYERS} probes without controls, beside scikit-learn's grid search",
            ours=f"{ours:.1f} s",
            peer=f"{peer:.1f} s",
            ratio=ours / peer,
            limit=None,
            note=f"same folds; AUCs differ by at most {apart:.4f}",
        ),
    ]


def drawn(layers: int, transcripts: int, width: int, seed: int) -> tuple[Activations, np.ndarray, list[int], list[int]]:
    """Activations, and of each transcript its label and question; of each row its length. Only seed 0's layers know the label."""
    draw = torch.Generator().manual_seed(seed)
    labels = np.random.default_rng(0).random(transcripts) < 0.5
    index = torch.arange(transcripts).repeat(len(SPANS))
    spans = torch.arange(len(SPANS)).repeat_interleave(transcripts)
    spectrum = torch.arange(1, width + 1) ** -0.5
    knows = torch.from_numpy(labels).float()[index]
    values = {}
    for layer in range(layers):
        X = torch.randn(len(index), width, generator=draw) * spectrum
        if seed == 0:
            X[:, width // 3] += knows * spectrum[width // 3] * layer / layers
        values[Site(layer, "resid")] = X
    lengths = (20 + 30 * torch.rand(len(index), generator=draw) + 5 * knows).long().tolist()
    acts = Activations(values, index, torch.full((len(index),), -1), spans, SPANS)
    return acts, labels, [i // SAMPLES for i in range(transcripts)], lengths


def grid_search(X: np.ndarray, labels: np.ndarray, questions: list[int]) -> float:
    """Held-out AUC of a pipeline whose penalty scikit-learn's own grid search chooses on the same folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    groups = units(questions)
    fold, scores = deal(groups, labels), np.empty(len(labels))
    for k in range(5):
        train = fold != k
        inner = deal(units(groups[train]), labels[train], folds=INNER)
        splits = [(np.flatnonzero(inner != j), np.flatnonzero(inner == j)) for j in range(INNER)]
        pipe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        grid = {"logisticregression__C": list(PENALTIES)}
        found = GridSearchCV(pipe, grid, cv=splits, scoring="neg_log_loss").fit(X[train], labels[train])
        scores[~train] = found.predict_proba(X[~train])[:, 1]
    return auc(scores, labels, fold)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result

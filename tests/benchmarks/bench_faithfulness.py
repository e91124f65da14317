"""Early answers with shared prefixes beside every cut from scratch, on chained-sum traces.

Counted are forward tokens: new positions that go through the model, without padding; padded counts are in the note. The
check that reads the first cut both ways is counted on our side.
"""

import time
from pathlib import Path

from analyses.faithfulness import EarlyAnswers, early_answers
from analyses.tasks import chained_sums
from surgery.model import Model

COUNT = 40
LIMIT = 1 / 3


def run(folder: str | Path, count: int = COUNT) -> list[dict]:
    """Rows {name, ours, peer, ratio, limit, note} for the model in ``folder``, in float32 on the CPU."""
    model = Model.load(folder, device="cpu", dtype="float32")
    questions = chained_sums(count, seed=0, side="test")
    transcripts = [model.transcript(q.question, q.completion(model.markers)) for q in questions]

    def timed(share: bool) -> tuple[EarlyAnswers, float]:
        start = time.perf_counter()
        result = early_answers(model, questions, transcripts, share=share)
        return result, time.perf_counter() - start

    early_answers(model, questions[:2], transcripts[:2])  # the first call pays for imports and buffers
    (ours, our_seconds), (peer, peer_seconds) = timed(True), timed(False)
    if not ours.cost.shared:
        raise RuntimeError(f"prefixes were not shared: {ours.cost.reason}")
    same = sum(a.answer == b.answer for a, b in zip(ours.readings, peer.readings, strict=True))
    read = len(peer.readings)
    note = f"{count} traces, {read} cuts; answers identical in {same} of {read}"
    return [
        _row("early answers, forward tokens", ours.cost.tokens, peer.cost.tokens, LIMIT, note),
        _row("early answers, forward tokens with padding", ours.cost.padded, peer.cost.padded, None, note),
        _row("early answers, model calls", ours.cost.calls, peer.cost.calls, None, note),
        _row("early answers, seconds", round(our_seconds, 2), round(peer_seconds, 2), None, note),
        _row("early answers, cuts that differ", read - same, 0, 0, note),
    ]


def _row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict:
    ratio = ours / peer if peer else ours
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "limit": limit, "note": note}

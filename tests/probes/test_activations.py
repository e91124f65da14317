"""Rows are the activations of the module itself, whatever the batch; there is no padding among them."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.activations import Activations, collect, completion_nll, gradients, moments, stream
from probes.attribution import contributions
from probes.capture import forward
from probes.linear import probe
from probes.shards import _cut
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import positions, read_transcript
from tests.families import FAMILIES, tiny

TEXTS = [f"<think>{'ab' * (3 * i % 7)}</think>{i}" for i in range(8)]


def setup(family="llama", **options):
    model = Model(*tiny(family, **options))
    return model, [model.transcript("q" * (1 + i % 3), text) for i, text in enumerate(TEXTS)]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def literal(model, transcript, sites):
    """Every activation of one transcript alone: plain hooks, one a site, on a pass of the whole model without a mask."""
    found = {}
    handles = [model.anatomy.tap(s).attach(model.module, lambda x, s=s: found.update({s: x[0].clone()})) for s in sites]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([transcript.ids])).logits[0]
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streams_of_the_module(family):
    model, runs = setup(family)
    acts = collect(model, runs, at="*.resid", over="all", batch_size=3)
    assert [str(s) for s in acts.sites] == ["0.resid", "1.resid", "2.resid", "3.resid"]
    assert len(acts) == sum(len(t.ids) for t in runs)
    for i, t in enumerate(runs):
        mine = acts.where(acts.transcript == i)
        assert mine.position.tolist() == list(range(len(t.ids)))
        last = []
        norm = model.module.get_submodule(model.anatomy.tap(Site(3, "resid")).path)
        hook = norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        ids = torch.tensor([t.ids])
        with torch.no_grad():
            states = model.module(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            ).hidden_states
        hook.remove()
        for layer in range(3):
            torch.testing.assert_close(mine[f"{layer}.resid"], states[layer][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine["3.resid"], last[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_every_site_and_head_of_a_padded_batch(family):
    model, runs = setup(family)
    acts = collect(model, runs, at=["**", "*.attn.z.h3", "1.attn.z.h0"], over="all")
    a = model.anatomy
    assert acts.sites[:5] == [
        Site(0, "resid"),
        Site(0, "attn.z"),
        Site(0, "attn.z", 3),
        Site(0, "attn.out"),
        acts.sites[4],
    ]
    for i, t in enumerate(runs):
        alone, _ = literal(model, t, a.activation_sites())
        mine = acts.where(acts.transcript == i)
        for site in acts.sites:
            value = alone[site.whole]
            if site.head is not None:
                value = value.unflatten(-1, (a.n_heads, a.head_dim))[:, site.head]
            torch.testing.assert_close(mine[site], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_eight_is_eight_of_one(family):
    model, runs = setup(family)
    together, alone = (collect(model, runs, over=("thinking", "answer"), batch_size=n) for n in (8, 1))
    for name in ("transcript", "position", "span"):
        assert torch.equal(getattr(together, name), getattr(alone, name))
    for site in together.sites:
        torch.testing.assert_close(together[site], alone[site], rtol=1e-4, atol=1e-4)
    rows = [
        (i, p, k)
        for i, t in enumerate(runs)
        for k, name in enumerate(("thinking", "answer"))
        for p in range(*t.spans[name])
    ]
    labels = (together.transcript, together.position, together.span)
    assert list(zip(*(column.tolist() for column in labels), strict=True)) == rows


class Rounding(torch.nn.Linear):
    """A layer that rounds by the shape of the batch, as fast kernels do."""

    def forward(self, input):
        return super().forward(input) * (1 + 1e-6 * input.shape[1])


@pytest.mark.parametrize("shard", [None, 300], ids=["memory", "folder"])
def test_the_same_tokens_have_the_same_row_whatever_follows(shard, tmp_path, monkeypatch):
    """To the bit: else roundings would tell the answers to a question apart before they begin."""
    model, _ = setup()
    runs = [model.transcript("qq", text) for text in TEXTS]
    layer = model.module.model.layers[1]
    layer.mlp.down_proj.__class__ = Rounding
    monkeypatch.setattr("probes.shards.SHARD_BYTES", shard)  # two rows in a file
    for pool in (None, "mean"):
        to = shard and tmp_path / str(pool)
        acts = collect(model, runs, at="2.resid", over=("prompt", "answer"), pool=pool, batch_size=3, to=to)
        assert not to or len(list(to.glob("rows-*"))) > 2
        first, *others = (acts["2.resid"][(acts.transcript == i) & (acts.span == 0)] for i in range(8))
        assert all(torch.equal(first, other) for other in others)
        ends = acts["2.resid"][acts.span == 1]
        assert len(ends.unique(dim=0)) == len(ends)
    with layer.register_forward_hook(lambda _, args, output: output + args[0].mean(1, keepdim=True)):
        acts = collect(model, runs, at="2.resid", over="prompt[-1]", batch_size=8)  # a hook may look ahead
    assert len(acts["2.resid"].unique(dim=0)) == 8


OVER = ["thinking[-1]", "thinking[:3]", "sentence[0]", "/b.{0,1}/", "prompt~/q+/", "answer", "all"]


@pytest.mark.parametrize("over", OVER)
def test_rows_are_the_tokens_of_the_span(over):
    model, runs = setup()
    everything = collect(model, runs, at="2.mid", over="all")
    acts = collect(model, runs, at="2.mid", over=over)
    expected = [(i, p) for i, t in enumerate(runs) for p in positions(t, over)]
    assert expected
    assert list(zip(acts.transcript.tolist(), acts.position.tolist(), strict=True)) == expected
    where = {
        (i, p): k
        for k, (i, p) in enumerate(zip(everything.transcript.tolist(), everything.position.tolist(), strict=True))
    }
    torch.testing.assert_close(
        acts["2.mid"], everything["2.mid"][[where[row] for row in expected]], rtol=1e-4, atol=1e-4
    )


def test_a_token_in_two_spans_has_one_row_under_the_first():
    model, runs = setup()
    acts = collect(model, runs, at="1.resid", over=("thinking", "completion"))
    for i, t in enumerate(runs):
        mine = acts.where(acts.transcript == i)
        assert mine.position.tolist() == list(range(*t.spans["completion"]))
        assert mine.position[mine.span == 0].tolist() == list(range(*t.spans["thinking"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling(family):
    model, runs = setup(family)
    over = ("thinking", "prompt", "all", "thinking[-1]")
    at = ["1.resid", "2.attn.z.h1"]
    every = collect(model, runs, at=at, over="all")
    mean, last = (collect(model, runs, at=at, over=over, pool=pool, batch_size=3) for pool in ("mean", "last"))
    rows = [(i, k) for i, t in enumerate(runs) for k, name in enumerate(over) if positions(t, name)]
    assert [(i, k) for i, k in rows if i == 0] == [(0, 1), (0, 2)]  # the first transcript thought nothing
    for pooled in (mean, last):
        assert list(zip(pooled.transcript.tolist(), pooled.span.tolist(), strict=True)) == rows
    assert set(mean.position.tolist()) == {-1}
    for row, (i, k) in enumerate(rows):
        tokens = positions(runs[i], over[k])
        assert last.position[row] == tokens[-1]
        for site in mean.sites:
            mine = every[site][every.transcript == i]
            torch.testing.assert_close(mean[site][row], mine[tokens].mean(0), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(last[site][row], mine[tokens[-1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_stops_at_the_last_site(family):
    model, runs = setup(family)
    a, called = model.anatomy, []
    blocks = [model.module.get_submodule(f"{a.blocks}.{layer}") for layer in range(3)]
    handles = [b.register_forward_pre_hook(lambda *_, i=i: called.append(i)) for i, b in enumerate(blocks)]
    collect(model, runs[:1], at=["1.attn.z.h2", "0.mlp.out"])
    assert called == [0, 1]
    for handle in handles:
        handle.remove()
    assert hooks(model) == 0


def test_nothing_is_left_after_an_exception():
    model, runs = setup()
    ids = torch.tensor([runs[3].ids])
    with torch.no_grad():
        before = model.module(input_ids=ids).logits

    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward(model, [runs[3].ids], [Site(0, "resid"), Site(1, "mid")], fail)
    with pytest.raises(ZeroDivisionError):
        gradients(model, runs, of=lambda logits, t: 1 / 0)
    assert hooks(model) == 0
    assert all(p.requires_grad for p in model.module.parameters())
    with torch.no_grad():
        assert torch.equal(model.module(input_ids=ids).logits, before)


def test_what_is_changed_by_hooks_is_what_is_seen():
    model, runs = setup()
    plain = collect(model, runs, at=["1.resid", "2.resid"])
    handle = model.anatomy.tap(Site(1, "resid")).attach(model.module, lambda x: x + 1)
    try:
        moved = collect(model, runs, at=["1.resid", "2.resid"])
    finally:
        handle.remove()
    torch.testing.assert_close(moved["1.resid"], plain["1.resid"] + 1, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved["2.resid"], plain["2.resid"], atol=1e-2)


def test_collect_says_where_prompts_end_so_that_steering_by_span_acts():
    from probes.steering import steered

    model, runs = setup()
    plain = collect(model, runs, at=["1.resid", "2.resid"], over="all", batch_size=3)
    push = torch.full((32,), 2.0)
    with steered(model, push, strength=1, at="1.resid", over="thinking", units="raw"):
        moved = collect(model, runs, at=["1.resid", "2.resid"], over="all", batch_size=3)
    inside = torch.cat([torch.isin(torch.arange(len(t.ids)), torch.tensor(positions(t, "thinking"))) for t in runs])
    assert inside.any()
    shift = (moved["1.resid"] - plain["1.resid"]).abs().amax(1) > 1e-3
    marker = torch.cat([torch.isin(torch.arange(len(t.ids)), torch.tensor(closing(t))) for t in runs])
    assert torch.equal(shift, inside | marker)


def closing(transcript):
    """The first characters of the closing marker are thinking until its last one comes."""
    end = transcript.spans["thinking"][1]
    return list(range(end, end + len("</think")))


def test_bfloat16_is_widened_exactly():
    model, runs = setup(dtype=torch.bfloat16)
    acts = collect(model, runs, at="**")
    assert all(v.dtype == torch.float32 and torch.equal(v, v.bfloat16().float()) for v in acts.values.values())
    mean = collect(model, runs[-1:], at="1.resid", over="all", pool="mean")["1.resid"]
    every = collect(model, runs[-1:], at="1.resid", over="all")["1.resid"]
    torch.testing.assert_close(mean[0], every.mean(0), rtol=1e-5, atol=1e-6)


# --- streaming ------------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole_in_pieces():
    model, runs = setup()
    options = {"at": ["1.resid", "2.attn.z"], "over": ("thinking", "answer")}
    whole = collect(model, runs, **options)
    pieces = list(stream(model, runs, **options, batch_size=3))
    assert [len(p.transcript.unique()) for p in pieces] == [3, 3, 2]
    labels = torch.cat([torch.stack((p.transcript, p.position, p.span)) for p in pieces], 1)
    order = (labels[0] * 1000 + labels[1]).argsort()
    assert torch.equal(labels[:, order], torch.stack((whole.transcript, whole.position, whole.span)))
    for site in whole.sites:
        rows = torch.cat([p[site] for p in pieces])[order]
        torch.testing.assert_close(rows, whole[site], rtol=1e-4, atol=1e-4)


def test_moments_of_a_model_are_those_of_the_rows():
    model, runs = setup("gemma2")
    options = {"at": ["1.mid", "*.attn.z.h2"], "over": "completion"}
    acts, found = collect(model, runs, **options), moments(model, runs, **options, batch_size=3)
    assert list(found) == acts.sites
    for site, m in found.items():
        rows = acts[site].double()
        assert m.count == len(rows)
        torch.testing.assert_close(m.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m.covariance(), rows.T.cov(), rtol=1e-4, atol=1e-4)


# --- gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_differences(family):
    """Moved a little along its gradient, an activation changes the number by the gradient's length for each unit of the move."""
    model, runs = setup(family)
    model.module.double()
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)  # as where a few are being tuned
    text = runs[3]
    at = [s for s in model.anatomy.activation_sites() if s.layer in (1, 3)] + [Site(2, "attn.z", 1)]
    found = gradients(model, runs[:5], at=at, over="all", batch_size=3)
    found = found.where(found.transcript == 3)

    def number():
        with torch.no_grad():
            return completion_nll(model.module(input_ids=torch.tensor([text.ids])).logits[0], text)

    for site in at:
        gradient = found[site].double()
        step = 1e-2 * gradient / gradient.norm()
        sides = []
        for sign in (1, -1):
            # a change of what the MLP's norm reads is not yet one of the stream beside it; one of what attention adds is
            moved = Site(site.layer, "attn.out") if site.part == "mid" else site
            handle = model.anatomy.tap(moved).attach(model.module, lambda x, d=sign * step: x + d)
            sides.append(number())
            handle.remove()
        assert float(gradient.norm()) == pytest.approx(float(sides[0] - sides[1]) / 2e-2, rel=1e-2), site


def test_the_default_number_is_the_completions_likelihood():
    model, runs = setup()
    bare = read_transcript(model.tokenizer, "", [], runs[3].ids)  # all completion: its first token is given nothing
    for text, begin in ((runs[3], runs[3].spans["completion"][0]), (bare, 1)):
        _, logits = literal(model, text, [])
        literally = [-logits[p - 1].log_softmax(-1)[text.ids[p]] for p in range(begin, len(text.ids))]
        assert float(completion_nll(logits, text)) == pytest.approx(float(sum(literally)) / len(literally), rel=1e-5)
        half = logits.bfloat16()
        assert float(completion_nll(half, text)) == pytest.approx(float(completion_nll(half.float(), text)), rel=1e-6)


def test_gradients_leave_parameters_and_their_gradients_alone():
    model, runs = setup()
    weight = model.module.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    frozen = model.module.model.norm.weight.requires_grad_(False)
    rows = []  # of logits: each transcript's own, without padding

    def of(logits, text):
        rows.append((len(logits), len(text.ids)))
        return completion_nll(logits, text)

    found = gradients(model, runs, of=of, at="*.mid", over="thinking", pool="mean")
    assert all(own == given for given, own in rows)
    assert all(bool(v.any()) for v in found.values.values())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert [p.requires_grad for p in (weight, frozen)] == [True, False]
    assert not any(p.grad is not None for p in model.module.parameters() if p is not weight)


def test_what_is_no_number_has_no_gradient():
    model, runs = setup()
    for wrong in (lambda logits, t: logits, lambda logits, t: 1.0, lambda logits, t: torch.tensor(2.0)):
        with pytest.raises(ValueError, match="one number that depends on the logits; the function gave"):
            gradients(model, runs, of=wrong)


def test_a_token_that_comes_too_late_has_no_gradient():
    model, runs = setup()
    found = gradients(model, runs[:2], of=lambda logits, t: logits[2].sum(), at="1.resid", over="all")
    assert not found["1.resid"][found.position > 2].any()
    assert found["1.resid"][found.position <= 2].any()


# --- on disk --------------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model, runs = setup()
    acts = collect(model, runs, at=["*.resid", "1.mid", "1.attn.z.h1"], over=("thinking", "answer", "/a, b/"))
    acts.save(tmp_path / "a.safetensors")
    again = Activations.load(tmp_path / "a.safetensors")
    assert again.over == ("thinking", "answer", "/a, b/")
    assert again.sites == acts.sites
    assert all(torch.equal(again[s], acts[s]) for s in acts.sites)
    assert all(torch.equal(getattr(again, name), getattr(acts, name)) for name in ("transcript", "position", "span"))


def stored(model, runs, folder, **options):
    return collect(
        model, runs, **{"at": ["1.resid", "2.attn.z.h0"], "over": ("thinking", "answer")} | options, to=folder
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("probes.shards.SHARD_BYTES", 4 * (32 + 12) * 12)  # twelve rows


def same(a, b):
    names = ("transcript", "position", "span")
    assert a.sites == b.sites
    assert a.over == b.over
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    for site in a.sites:
        torch.testing.assert_close(a[site], b[site], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [None, "mean"])
def test_a_folder_holds_what_collect_gives(tmp_path, small_shards, pool):
    model, runs = setup()
    whole = collect(model, runs, at=["1.resid", "2.attn.z.h0"], over=("thinking", "answer"), pool=pool)
    same(stored(model, runs, tmp_path / "a", pool=pool), whole)
    read = Activations.load(tmp_path / "a")
    same(read, whole)
    assert [read.values.get(Site.parse(site)) is None for site in ("1.resid", "0.resid")] == [False, True]
    assert len(list((tmp_path / "a").iterdir())) > 2
    parts = list(Activations.shards(tmp_path / "a"))
    assert len(parts) == len(list((tmp_path / "a").glob("rows-*")))
    assert torch.equal(torch.cat([p["1.resid"] for p in parts]), Activations.load(tmp_path / "a")["1.resid"])
    assert all(len(p) <= 12 or len(p.transcript.unique()) == 1 for p in parts)
    assert all(len(a) + len(b) > 12 for a, b in pairwise(parts))
    few = [model.transcript("q", f"<think>{'ab' * 7}</think>1"), model.transcript("q", "1")]
    options = {"over": ("thinking",), "pool": pool}  # a full shard, and nothing after it
    same(stored(model, few, tmp_path / "b", **options), collect(model, few, at=["1.resid", "2.attn.z.h0"], **options))


def test_interrupted_it_goes_on_where_it_stopped(tmp_path, small_shards):
    model, runs = setup()
    whole = collect(model, runs, at=["1.resid", "2.attn.z.h0"], over=("thinking", "answer"))
    seen = []

    def fail(_, args):
        seen.append(args)
        if len(seen) > 2:
            raise KeyboardInterrupt

    handle = model.module.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stored(model, runs, tmp_path / "a")
    handle.remove()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("rows-*")}
    assert len(done) == 2
    with pytest.raises(ValueError, match=r"is not complete: .* shards are missing"):
        Activations.load(tmp_path / "a")
    same(stored(model, runs, tmp_path / "a"), whole)
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    assert not list((tmp_path / "a").glob(".*"))


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, runs = setup()

    def full(a, b):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        stored(model, runs, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_killed_while_writing_nothing_half_written_counts(tmp_path):
    """A process that dies between the bytes and the rename leaves a folder that can be gone on with."""
    code = f"""
import os
from pathlib import Path
from tests.probes.test_activations import setup, stored
import probes.shards
probes.shards.SHARD_BYTES = 4 * (32 + 12) * 12
replaced, count = os.replace, [0]
def replace(a, b):
    count[0] += 1
    if count[0] == 4:
        os._exit(9)
    replaced(a, b)
os.replace = replace
stored(*setup(), Path({str(tmp_path / "a")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    assert len(list((tmp_path / "a").glob("rows-*"))) == 2
    model, runs = setup()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.shards.SHARD_BYTES", 1)  # the folder's own division counts
        again = stored(model, runs, tmp_path / "a")
    same(again, collect(model, runs, at=["1.resid", "2.attn.z.h0"], over=("thinking", "answer")))


def test_a_folder_of_something_else_is_refused(tmp_path):
    model, runs = setup()
    stored(model, runs, tmp_path / "a")
    cases = [
        ({"over": "answer"}, "over.*'thinking', 'answer'.* there, .*'answer'.* asked for"),
        ({"at": "1.resid"}, r"sites.*'1\.resid', '2\.attn\.z\.h0'.* there"),
        ({"pool": "last"}, "pool None there, 'last' asked for"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            stored(model, runs, tmp_path / "a", **options)
    with pytest.raises(ValueError, match=r"was collected from other transcripts and tokens\. Give another folder"):
        stored(model, runs[::-1], tmp_path / "a")
    with pytest.raises(ValueError, match=r"was collected from other model\. Give"):
        stored(setup(seed=1)[0], runs, tmp_path / "a")
    for cut in (4, 5):  # the same tokens, of which others are averaged
        parts = [dataclasses.replace(t, spans={**t.spans, "a": (2, cut), "b": (cut, 7)}) for t in runs]
        with nullcontext() if cut == 4 else pytest.raises(ValueError, match=r"was collected from other tokens\. Give"):
            stored(model, parts, tmp_path / "c", over=("a", "b"), pool="mean")
    with torch.no_grad():
        model.module.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"was collected from other model\. Give"):
        stored(model, runs, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    (tmp_path / "b" / ".capture.json.partial-1").write_text("{")
    for foreign in (tmp_path / "b", tmp_path / "b" / "notes.txt"):
        with pytest.raises(ValueError, match="was not made by collect"):
            stored(model, runs, foreign)
    with pytest.raises(ValueError, match=r"has no capture\.json"):
        Activations.load(tmp_path / "b")


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 9))
def test_shards_hold_every_row_once_and_as_many_as_fit(rows, most):
    ranges = _cut(rows, most)
    held = [sum(rows[begin:end]) for begin, end in ranges]
    assert [i for a, b in ranges for i in range(a, b) if rows[i]] == [i for i, count in enumerate(rows) if count]
    assert all(count and (count <= most or count == max(rows[a:b])) for count, (a, b) in zip(held, ranges, strict=True))
    for count, (begin, _) in zip(held, ranges[1:], strict=False):
        assert count + rows[begin] > most


def test_the_folder_says_what_it_is_of(tmp_path):
    model, runs = setup()
    stored(model, runs, tmp_path / "a")
    about = json.loads((tmp_path / "a" / "capture.json").read_text())["about"]
    assert about["sites"] == ["1.resid", "2.attn.z.h0"]
    assert about["over"] == ["thinking", "answer"]
    assert set(about) == {"sites", "over", "pool", "transcripts", "tokens", "model", "dtype"}


# --- bad input ------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_collected():
    model, runs = setup()
    with pytest.raises(
        ValueError, match=r"'\*\.attn\.o' matches no site.*have: attn\.out, attn\.z, mid, mlp\.out, resid"
    ):
        collect(model, runs, at="*.attn.o")
    for site in ("1.resid.h0", "1.attn.z.h4"):
        with pytest.raises(ValueError, match=rf"{site} does not exist: activations have heads at attn\.z, h0 to h3"):
            collect(model, runs, at=site)
    with pytest.raises(ValueError, match=r"'poem' is not a span\. Ask for prompt, completion"):
        collect(model, runs, over="poem")
    plain = [model.transcript("q", "no thought") for _ in runs]
    with pytest.raises(
        ValueError, match=r"None of the 8 transcripts has a span thinking or sentence.1.; they have all, answer"
    ):
        collect(model, plain, over=("thinking", "sentence[1]"))
    with pytest.raises(ValueError, match="None of the 0 transcripts"):
        collect(model, [])
    with pytest.raises(ValueError, match="No span is named"):
        collect(model, runs, over=())
    with pytest.raises(ValueError, match="batch_size=0"):
        stream(model, runs, batch_size=0)  # before the first batch is asked for
    acts = collect(model, runs, at=["*.resid", "1.attn.z"])
    for wrong, said in (
        ("*.resid", "is not a site"),
        ("7.resid", "matches no site"),
        ("1.attn.z.h0", "matches no site"),
    ):
        with pytest.raises(ValueError, match=said):
            acts[wrong]


def test_texts_are_no_transcripts(unchecked):
    model, _ = setup()
    said = r"A transcript was expected, not a str .*model\.generate\(questions\) .* model\.transcript\(question, completion\)"
    for texts in (["the sky is"], "the sky is"):
        with pytest.raises(ValueError, match=said):
            collect(model, texts, over="all")
    with pytest.raises(ValueError, match=said):
        contributions(model, torch.ones(32), ["the sky is"], over="all")
    one = setup()[1][0]
    for take in (lambda: collect(model, one), lambda: probe(model, one, [1])):
        with pytest.raises(ValueError, match=r"list of transcripts was expected, not one: write \[transcript\]"):
            take()


def test_no_gradient_in_inference_mode():
    model, runs = setup()
    with torch.no_grad():
        assert gradients(model, runs[:1], at="1.resid")["1.resid"].any()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*no_grad"):
        gradients(model, runs[:1], at="1.resid")


def test_ways_to_pool_that_do_not_exist(unchecked):
    model, runs = setup()
    with pytest.raises(ValueError, match="pool='max' is no way to pool"):
        collect(model, runs, pool="max")


def test_layers_that_run_without_hooks():
    """What torch.compile does to a block: its forward is called directly, and no hook of it."""
    model, runs = setup()
    block = model.module.model.layers[1]
    block.__class__ = type("Compiled", (block.__class__,), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(ValueError, match=r"The hook on model\.layers\.1 never ran in the forward pass\. Compiled"):
        collect(model, runs, at=["1.resid", "2.resid"])
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nope",
        "{}",
        "[]",
        '{"about": {}, "shards": [5]}',
        '{"about": {"over": []}, "shards": [[0, 1]]}',
        '{"about": {"over": "answer", "sites": ["1.resid"]}, "shards": [[0, 1]]}',
        '{"about": 1, "shards": []}',
    ],
)
def test_a_damaged_folder_says_which_file_it_is(text, tmp_path, small_shards):
    """It ended in the words of a JSON parser, or a KeyError."""
    model, runs = setup()
    stored(model, runs, tmp_path / "a")
    (tmp_path / "a" / "capture.json").write_text(text)
    for call in (
        lambda: Activations.load(tmp_path / "a"),
        lambda: list(Activations.shards(tmp_path / "a")),
        lambda: stored(model, runs, tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match=r"capture\.json is damaged.*: remove the folder"):
            call()


def test_a_damaged_shard_says_which_it_is_and_is_made_anew(tmp_path, small_shards):
    model, runs = setup()
    whole = stored(model, runs, tmp_path / "a")
    before = {site: whole[site] for site in whole.sites}
    second = tmp_path / "a" / "rows-00001.safetensors"
    for spoiled in (b"", second.read_bytes()[:-5]):
        second.write_bytes(spoiled)
        for call in (
            lambda: Activations.load(tmp_path / "a"),
            lambda: list(Activations.shards(tmp_path / "a")),
            lambda: stored(model, runs, tmp_path / "a"),
        ):
            with pytest.raises(
                ValueError, match=r"rows-00001\.safetensors is damaged.*Remove it, and the same collect"
            ):
                call()
        second.unlink()
        again = stored(model, runs, tmp_path / "a")
        assert all(torch.equal(again[site], before[site]) for site in before)
    before_one = tmp_path / "one.safetensors"
    before_one.write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"one\.safetensors is damaged"):
        Activations.load(before_one)

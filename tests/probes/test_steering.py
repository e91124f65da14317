"""Steering does to the stream what its formula says, on the tokens it names and no others, and leaves nothing behind."""

from contextlib import contextmanager

import pytest
import torch

from probes.activations import collect
from probes.steering import Steering, steered, stream_norms
from surgery.model import Model
from surgery.rows import rows_are
from surgery.sites import Site, match
from tests.families import FAMILIES, HEAD_WIDTH, HIDDEN, tiny

TEXTS = ["<think>abc</think>yes", "no thoughts", "<think>a longer thought</think>x"]
QUESTIONS = ["one", "two and two", "a much longer question, it is", "on"]


def setup(family="llama", dtype=torch.float32):
    model = Model(*tiny(family, dtype=dtype))
    return model, [model.transcript("q" * (1 + i), text) for i, text in enumerate(TEXTS)]


def vector(width=HIDDEN, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def sites_of(model):
    return [s for s in model.anatomy.activation_sites() if s.layer == 1] + match(
        "1.attn.z.h2", model.anatomy.activation_sites()
    )


@contextmanager
def watching(model, sites):
    seen = {}
    handles = [model.anatomy.tap(s).attach(model.module, lambda h, s=s: seen.update({s: h.clone()})) for s in sites]
    yield seen
    for handle in handles:
        handle.remove()


def read(model, runs, sites=()):
    """Logits and activations of finished texts, padded on the right."""
    width = max(len(t.ids) for t in runs)
    ids = torch.zeros(len(runs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, t in enumerate(runs):
        ids[i, : len(t.ids)], mask[i, : len(t.ids)] = torch.tensor(t.ids), 1
    with torch.no_grad(), watching(model, sites) as seen, rows_are([t.spans["prompt"][1] for t in runs]):
        return model.module(input_ids=ids, attention_mask=mask).logits, seen


def members(runs, span):
    return [(i, p) for i, t in enumerate(runs) if span in t.spans for p in range(*t.spans[span])]


FORMULAS = {
    "add": lambda h, u, s, length: h + s * length * u,
    "ablate": lambda h, u, s, length: h - s * (h @ u)[:, None] * u,
    "clamp": lambda h, u, s, length: h - (h @ u)[:, None] * u + s * length * u,
}


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_the_formulas_on_the_span_and_nowhere_else(family):
    model, runs = setup(family)
    for site in sites_of(model):
        _, plain = read(model, runs, [site])
        v = vector(plain[site].shape[-1])
        length = stream_norms(model, site)[site]
        for how, formula in FORMULAS.items():
            strengths = (-0.7, 2.0, 0.0)[: (3 if how == "clamp" else 2) if family == "llama" else 1]  # 0 clamps to 0
            for strength in strengths:
                units = {site: length}
                with steered(model, v, strength=strength, at=site, over=("prompt", "completion"), how=how, units=units):
                    _, seen = read(model, runs, [site])
                expected = plain[site].clone()
                rows = torch.tensor([(i, p) for i, t in enumerate(runs) for p in range(len(t.ids))]).T
                expected[*rows] = formula(expected[*rows], v / v.norm(), strength, length)
                torch.testing.assert_close(seen[site], expected, rtol=1e-4, atol=1e-4)
        with steered(model, v, strength=3, at=site, over="completion"):
            _, seen = read(model, runs, [site])
        moved = (seen[site] - plain[site]).abs().sum(-1) > 1e-3
        assert moved.nonzero().tolist() == [list(m) for m in members(runs, "completion")]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt-neox"])
def test_what_is_changed_between_attention_and_mlp_goes_on_in_the_stream(family):
    model, runs = setup(family)
    sites = [Site.parse(s) for s in ("1.mid", "1.mlp.out", "2.resid")]
    with steered(model, vector(), strength=2, at=["1.mid", "1.resid", "1.attn.out"], over="completion"):
        _, seen = read(model, runs, sites)
    mid, out, after = (seen[s] for s in sites)
    torch.testing.assert_close(after, mid + out, rtol=1e-4, atol=1e-4)


def test_only_its_head_is_touched():
    model, runs = setup()
    site = Site.parse("1.attn.z.h2")
    _, plain = read(model, runs, [site.whole])
    with steered(model, vector(HEAD_WIDTH), strength=1, at=site, over="all"):
        _, seen = read(model, runs, [site.whole])
    changed = (seen[site.whole] != plain[site.whole]).any(0).any(0)
    assert changed.nonzero()[:, 0].tolist() == list(range(2 * HEAD_WIDTH, 3 * HEAD_WIDTH))


def test_thinking_is_steered_where_it_is():
    model, runs = setup()
    site = Site.parse("2.resid")
    _, plain = read(model, runs, [site])
    with steered(model, vector(), strength=1, at=site, over="thinking"):
        _, seen = read(model, runs, [site])
    moved = {(i, p) for i, p in (seen[site] != plain[site]).any(-1).nonzero().tolist()}
    closing = {(i, t.spans["thinking"][1] + k) for i, t in enumerate(runs) if "thinking" in t.spans for k in range(7)}
    assert moved == set(members(runs, "thinking")) | closing  # a marker of eight tokens is known at the eighth


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_the_same_tokens_with_a_cache_and_without(family):
    """What a steered generation says is what the steered model finds likeliest when it reads it in one pass."""
    model, _ = setup(family)
    few = ("completion", "all")
    for over in (*few, "prompt", "completion[2:5]", "prompt[-1]") if family in ("llama", "gemma2") else few:
        with steered(model, vector(), strength=0.5, at="1.resid", over=over):
            runs = model.generate(QUESTIONS, max_new_tokens=6, batch_size=3)
            logits, _ = read(model, runs)
            alone = [model.generate(q, max_new_tokens=6)[0] for q in QUESTIONS[1:3]]
        assert [t.ids for t in runs[1:3]] == [t.ids for t in alone]
        assert not torch.allclose(logits, read(model, runs)[0], atol=1e-3)
        for row, t in zip(logits, runs, strict=True):
            start = t.spans["completion"][0]
            assert row[start - 1 : len(t.ids) - 1].argmax(-1).tolist() == list(t.ids[start:])


@pytest.mark.parametrize("how", FORMULAS)
def test_forced_thoughts_read_through_a_cache(how):
    model, runs = setup()
    run = runs[2]
    with steered(model, vector(), strength=0.5, at=["1.mid", "2.attn.out"], over="thinking", how=how):
        whole, _ = read(model, [run])
        pieces, cache = [], None
        with torch.no_grad(), rows_are([run.spans["prompt"][1]]):
            for piece in torch.tensor([run.ids]).split([20, *[1] * (len(run.ids) - 20)], dim=1):
                out = model.module(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, read(model, [run])[0], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_no_steering(dtype):
    model, runs = setup(dtype=dtype)
    plain, _ = read(model, runs)
    for how in ("add", "ablate", lambda rows: rows + 1):
        direction = None if callable(how) else vector()
        with steered(model, direction, strength=0, at="*.resid", over="all", how=how):
            assert torch.equal(read(model, runs)[0], plain)
        with steered(model, direction, strength=[0.0, 1.0, 0.0], at="*.resid", over="all", how=how):
            rows = read(model, runs)[0]
        assert torch.equal(rows[[0, 2]], plain[[0, 2]])
        assert not torch.equal(rows[1], plain[1])


def test_half_precision_is_rounded_once():
    model, runs = setup(dtype=torch.bfloat16)
    site, u = Site.parse("1.resid"), vector() / vector().norm()
    _, plain = read(model, runs, [site])
    with steered(model, vector(), strength=0.03, at=site, over="all", units={site: 1.0}):
        _, seen = read(model, runs, [site])
    for i, t in enumerate(runs):
        expected = (plain[site][i, : len(t.ids)].float() + 0.03 * u).bfloat16()
        assert torch.equal(seen[site][i, : len(t.ids)].bfloat16(), expected)


def test_each_question_its_own_strength():
    model, _ = setup()
    strengths = [0.0, 0.5, -0.5, 1.0]
    for over in ("completion", "prompt", "all"):
        with steered(model, vector(), strength=strengths, at="1.resid", over=over):
            together = model.generate(QUESTIONS, samples=2, temperature=1.0, seed=3, max_new_tokens=5, batch_size=3)
        for i, strength in enumerate(strengths):
            with steered(model, vector(), strength=strength, at="1.resid", over=over):
                alone = model.generate(QUESTIONS, samples=2, temperature=1.0, seed=3, max_new_tokens=5)
            assert [t.ids for t in together[2 * i : 2 * i + 2]] == [t.ids for t in alone[2 * i : 2 * i + 2]]
    runs = [model.transcript("q", "abcab"), model.transcript("q", "a"), model.transcript("q", "abc")]
    with steered(model, vector(), strength=strengths[:3], at="1.resid"):
        together = collect(model, runs, at="2.resid", batch_size=2)  # not in the order of their lengths
    for i, strength in enumerate(strengths[:3]):
        with steered(model, vector(), strength=strength, at="1.resid"):
            alone = collect(model, [runs[i]], at="2.resid")["2.resid"]
        torch.testing.assert_close(together["2.resid"][together.transcript == i], alone, rtol=1e-4, atol=1e-4)
    few = steered(model, vector(), strength=[1.0, 2.0], at="1.resid", over="all")
    with few, pytest.raises(ValueError, match="2 strengths are given, but there is a row 3"):
        model.generate(QUESTIONS, max_new_tokens=2)


def test_several_at_once_in_their_order():
    model, runs = setup()
    u, v = vector(), vector(seed=1)
    one = Steering(u, 1.5, at=["1.resid", "2.mlp.out"], over="completion", units="raw")
    two = Steering(v, at="1.resid", over="all", how="ablate")
    three = Steering(None, at="2.attn.z", over="answer", how=torch.zeros_like)
    site = Site.parse("1.resid")
    for order in ([one, two, three], [three, two, one]):
        with steered(model, order):
            together, seen = read(model, runs, [site])
        with steered(model, order[0]), steered(model, order[1]), steered(model, order[2]):
            nested, _ = read(model, runs)
        torch.testing.assert_close(together, nested, rtol=1e-4, atol=1e-4)
        gone = (seen[site] @ (v / v.norm())).abs()[0, : len(runs[0].ids)]
        assert bool((gone < 1e-4).all()) == (order[0] is one)  # what is added after an ablation stays


def test_a_function_of_rows():
    model, runs = setup()
    site = Site.parse("1.attn.z")
    _, plain = read(model, runs, [site])
    shapes = []

    def halve(rows):
        shapes.append((rows.shape[0], rows.dtype))
        return rows / 2

    with steered(model, None, strength=0.5, at=site, over="answer", how=halve):
        _, seen = read(model, runs, [site])
    expected = plain[site].clone()
    for i, p in members(runs, "answer"):
        expected[i, p] *= 0.75
    for i, p in members(runs, "answer"):
        torch.testing.assert_close(seen[site][i, p], expected[i, p])
    opening = 2 * len("<think")  # is answer until the marker is whole
    assert shapes == [(len(members(runs, "answer")) + opening, torch.float32)]
    by_site = {site: halve, Site(2, "resid"): torch.neg}
    with steered(model, None, strength=0.5, over="answer", how=by_site):
        both, _ = read(model, runs)
    with (
        steered(model, None, strength=0.5, at=site, over="answer", how=halve),
        steered(model, None, strength=0.5, at="2.resid", over="answer", how=torch.neg),
    ):
        torch.testing.assert_close(both, read(model, runs)[0])
    with pytest.raises(ValueError, match=r"no function for 0\.resid; there are some for 1\.attn\.z, 2\.resid"):
        steered(model, None, at="0.resid", how=by_site).__enter__()


def test_leace_while_running():
    """What an eraser takes out of rows is gone from the stream that runs."""
    from probes.activations import collect
    from probes.erasure import leace

    model, runs = setup()
    acts = collect(model, runs, at=["1.resid", "2.resid"], over="all")
    erasers = leace(acts, (acts.position % 2).tolist())
    with steered(model, None, how={Site(1, "resid"): erasers[Site(1, "resid")]}, over="all"):
        inside = collect(model, runs, at="1.resid", over="all")
    torch.testing.assert_close(inside["1.resid"], erasers[Site(1, "resid")](acts["1.resid"]), rtol=1e-3, atol=1e-3)


class Directions(dict):
    """What a `Direction` looks like: unit vectors, their lengths, and a model they belong to."""

    def __init__(self, vectors, norms, width=HIDDEN):
        super().__init__(vectors)
        self.norms, self.width = norms, width

    def require(self, model):
        if model.anatomy.d_model != self.width:
            raise ValueError("another model")


def test_directions_by_site_and_by_layer():
    model, runs = setup()
    sites = [Site(1, "mid"), Site(2, "mid")]
    units = {s: vector(seed=i) / vector(seed=i).norm() for i, s in enumerate(sites)}
    many = Directions(units, {sites[0]: 2.0, sites[1]: 3.0})
    cases = [
        ({}, [(sites[0], units[sites[0]], 2.0), (sites[1], units[sites[1]], 3.0)]),
        ({"at": "1.resid"}, [(Site(1, "resid"), units[sites[0]], 2.0)]),
        (
            {"at": "1-2.mlp.out"},
            [(Site(1, "mlp.out"), units[sites[0]], 2.0), (Site(2, "mlp.out"), units[sites[1]], 3.0)],
        ),
    ]
    for options, expected in cases:
        with steered(model, many, strength=1.5, over="all", units="raw", **options):
            got, _ = read(model, runs)
        with steered(model, [Steering(length * u, 1.5, at=s, over="all", units="raw") for s, u, length in expected]):
            torch.testing.assert_close(got, read(model, runs)[0], rtol=1e-4, atol=1e-4)
    with steered(model, {1: units[sites[0]]}, at="1.mid", over="all"):
        by_number, _ = read(model, runs)
    with steered(model, units[sites[0]], at="1.mid", over="all"):
        assert torch.equal(by_number, read(model, runs)[0])
    none = r"no vector for 0\.resid and has none for its layer; it is at 1\.mid, 2\.mid"
    with pytest.raises(ValueError, match=none), steered(model, many, at="*.resid"):
        pass
    either = {"1.mid": vector(), "1.resid": vector(1)}
    with pytest.raises(ValueError, match=r"has 2 vectors for its layer"), steered(model, either, at="1.mlp.out"):
        pass
    with pytest.raises(ValueError, match="another model"), steered(model, Directions(units, many.norms, 7)):
        pass


def test_a_direction_as_it_was_found():
    from probes.directions import Direction

    model, runs = setup()
    found = Direction.of({Site(1, "mid"): 3 * vector(), Site(2, "mid"): vector(seed=1)})
    with steered(model, found, strength=-2, over="all", units="raw"):
        got, _ = read(model, runs)
    expected = [
        Steering(v, -2, at=s, over="all", units="raw")
        for s, v in ((Site(1, "mid"), 3 * vector()), (Site(2, "mid"), vector(seed=1)))
    ]
    with steered(model, expected):
        torch.testing.assert_close(got, read(model, runs)[0], rtol=1e-4, atol=1e-4)
    strange = Direction.of({Site(1, "mid"): vector()}, model="of another model")
    with pytest.raises(ValueError, match="model"), steered(model, strange):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_units(family):
    model, runs = setup(family)
    sites = match(["1.resid", "1.attn.out", "1.mlp.out", "1.attn.z"], model.anatomy.activation_sites())
    _, seen = read(
        model, runs, [*sites, Site(2, "resid"), *([Site(1, "mid")] if "mid" in model.anatomy.streams else [])]
    )
    norms = stream_norms(model, sites, runs)
    after = Site(1, "mid") if "mid" in model.anatomy.streams else Site(2, "resid")
    for site, stream in zip(sites, (Site(1, "resid"), Site(1, "attn.z"), after, Site(2, "resid")), strict=True):
        rows = torch.cat([seen[stream][i, 1 : len(t.ids)] for i, t in enumerate(runs)])
        assert norms[site] == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-4)
    with steered(model, 7 * vector(), strength=0.3, at="1.resid", over="all", units={Site(1, "resid"): 4.0}):
        given, _ = read(model, runs)
    with steered(model, vector() / vector().norm(), strength=1.2, at="1.resid", over="all", units="raw"):
        torch.testing.assert_close(given, read(model, runs)[0], rtol=1e-4, atol=1e-4)


def test_everything_is_given_back():
    model, runs = setup()
    plain, _ = read(model, runs)

    def failing():
        with steered(model, vector(), strength=2, at=["*.mid", "*.resid", "1.attn.out"], over="all"):
            assert not torch.equal(read(model, runs)[0], plain)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    two = [Steering(vector(), at="1.resid"), Steering(vector(3), at="1.resid")]
    with pytest.raises(ValueError, match="has shape"), steered(model, two):
        pass
    with pytest.raises(ValueError, match="Nobody said where"), steered(model, vector(), at="*.mid", over="thinking"):
        model.module(input_ids=torch.tensor([[5, 6]]))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())
    assert torch.equal(read(model, runs)[0], plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": float("nan")}, "A strength is a finite number"),
        ({"strength": []}, "A strength is a finite number"),
        ({"strength": [1.0, float("inf")]}, "A strength is a finite number"),
        ({"at": None}, "Say where to steer"),
        ({"at": "9.resid"}, r"'9\.resid' matches no site"),
        ({"at": "1.attn.z.h9"}, r"1\.attn\.z\.h9 does not exist.*h0 to h3"),
        ({"at": "1.resid.h1"}, r"1\.resid\.h1 does not exist"),
        ({"at": "1.attn.z"}, r"1\.attn\.z is 48 wide; the direction has shape \(32,\)"),
        ({"at": "1.attn.q"}, r"'1\.attn\.q' matches no site"),
        ({"direction": vector(31)}, r"1\.resid is 32 wide; the direction has shape \(31,\)"),
        ({"direction": torch.zeros(HIDDEN)}, "finite and not zero"),
        ({"direction": vector() / 0}, "finite and not zero"),
        ({"how": "push"}, "how='push'"),
        ({"units": "metres"}, "units='metres'"),
        ({"units": {Site(2, "resid"): 1.0}}, r"units give no length for 1\.resid"),
        ({"how": torch.relu}, "a direction, or a function of rows"),
        ({"direction": None}, "a direction, or a function of rows"),
    ],
)
def test_what_cannot_be_steered(options, message, unchecked):
    model, _ = setup()
    given = {"direction": vector(), "at": "1.resid"} | options
    with pytest.raises(ValueError, match=message), steered(model, given.pop("direction"), **given):
        pass


def test_a_direction_by_layers_is_asked_where_in_them():
    model, _ = setup()
    with (
        pytest.raises(ValueError, match=r"Say where to steer, as in at='\*\.resid'.*layers"),
        steered(model, {1: vector()}),
    ):
        pass


def test_compiled_layers_and_confused_calls():
    model, _ = setup()
    said = Steering(vector(), at="1.resid")
    with pytest.raises(TypeError, match="strength: a Steering already says how"), steered(model, said, strength=2):
        pass
    model.module.model.layers[1].compile()
    with pytest.raises(ValueError, match=r"model\.layers\.1 is compiled"), steered(model, vector(), at="0.resid"):
        pass


def test_nested_steerings_count_in_the_stream_without_steering():
    """What a strength is counted in does not depend on what steers already: nested is together."""
    model, runs = setup()
    outer = Steering(vector(), [3.0] * len(runs), at="1.resid", over="completion")
    inner = Steering(vector(seed=1), 0.5, at="2.resid", over="completion")
    with steered(model, [outer, inner]):
        together, _ = read(model, runs)
    with steered(model, outer), steered(model, inner):
        nested, _ = read(model, runs)
    torch.testing.assert_close(together, nested, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt-neox"])
def test_nested_is_together_between_attention_and_mlp(family):
    """What an outer block does to the stream there comes after what an inner one has done to the stream before it."""
    from probes.activations import collect
    from probes.erasure import leace

    model, runs = setup(family)
    acts = collect(model, runs, at="1.mid", over="all")
    eraser = leace(acts, (acts.position % 2).tolist())[Site(1, "mid")]
    inner = [
        Steering(vector(seed=1), 3.0, at=["1.resid", "1.attn.out"], over="completion"),
        Steering(vector(seed=2), 0.5, at="1.mid", over="all", how="ablate"),
    ]
    for outer in (
        Steering(vector(), 1.0, at="1.mid", over="all", how="ablate"),
        Steering(vector(), 0.5, at="1.mid", over="all", how="clamp"),
        Steering(None, at="1.mid", over="all", how=eraser),
    ):
        with steered(model, [outer, *inner]):
            together, _ = read(model, runs)
        with steered(model, outer):
            before, _ = read(model, runs)
            with steered(model, inner):
                nested, _ = read(model, runs)
            assert torch.equal(read(model, runs)[0], before)
        torch.testing.assert_close(nested, together, rtol=1e-4, atol=1e-4)


def test_what_steers_nothing_or_not_a_number(unchecked):
    model, _ = setup()
    with pytest.raises(ValueError, match="No span is named"), steered(model, vector(), at="1.resid", over=[]):
        pass
    for bad in (float("nan"), -1.0, 0.0):
        steering = steered(model, vector(), at="1.resid", units={"1.resid": bad})
        with pytest.raises(ValueError, match=rf"units at 1\.resid: {bad} is no length"), steering:
            pass
    with pytest.raises(ValueError, match="A strength is a finite number, or one for each row; this is four"):
        Steering(vector(), "four", at="1.resid")

"""A site is the matrix the module multiplies by; a wrong table is found out."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from surgery.anatomy import Anatomy, Place
from surgery.edits import Scale
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import apply
from tests.families import FAMILIES, tiny


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def model(family, tied=True) -> Model:
    return Model(*tiny(family, tied=tied))


IDS = torch.arange(4, 24)[None]


def calls(module, path):
    """The input and the output of a submodule in one forward pass."""
    seen = {}
    hook = module.get_submodule(path).register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        module(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    hook.remove()
    return seen["x"], seen["y"]


def by_hand(family: str, part: str, y: torch.Tensor) -> torch.Tensor:
    """The piece of a module's output that a site's matrix makes, restated from the module's own forward pass."""
    if family == "gpt2" and part in ("q", "k", "v"):
        return dict(zip("qkv", y.split(32, dim=2), strict=True))[part]
    if family == "phi3" and part in ("q", "k", "v"):
        return {"q": y[..., :48], "k": y[..., 48:72], "v": y[..., 72:]}[part]
    if family == "gpt-neox" and part in ("q", "k", "v"):  # view(heads, 3 * head_dim), then chunk
        heads = y.view(*y.shape[:2], 4, 3 * 8)
        return dict(zip("qkv", heads.chunk(3, dim=-1), strict=True))[part].flatten(2)
    if family == "phi3" and part in ("gate", "up"):
        return dict(zip(("gate", "up"), y.chunk(2, dim=-1), strict=True))[part]
    return y


def test_every_matrix_is_the_one_the_module_multiplies_by(family, tied):
    m = model(family, tied)
    for site in m.anatomy.linear_sites():
        place = m.anatomy.places[site]
        x, y = calls(m.module, place.name.removesuffix(".weight"))
        bias = m.weights[f"{site}.bias"] if f"{site}.bias" in m.weights else None  # noqa: SIM401 - a Mapping whose misses explain themselves
        expected = by_hand(family, site.part.split(".")[1], y)
        torch.testing.assert_close(functional.linear(x, m.weights[site], bias), expected, rtol=1e-5, atol=1e-5)


def test_every_tensor_has_a_site_and_every_site_one_tensor(family, tied):
    m = model(family, tied)
    covered = {name: 0 for name, _ in m.module.named_parameters()}
    for site, place in m.anatomy.places.items():
        assert not site.is_unnamed
        covered[place.name] += m.weights.shape(site).numel()
    assert covered == {name: p.numel() for name, p in m.module.named_parameters()}
    assert (Site(None, "head") in m.anatomy.places) == (not tied)
    assert torch.equal(m.weights["head"], m.module.get_output_embeddings().weight)
    assert len(m.anatomy.linear_sites()) == 3 * (6 if family in ("gpt2", "gpt-neox") else 7)


def test_put_is_the_inverse_of_take(family):
    m = model(family)
    for site, place in m.anatomy.places.items():
        stored = m.weights.parameter(site).detach()
        value = torch.randn(m.weights.shape(site))
        new = place.put(stored, value)
        assert torch.equal(place.take(new), value)
        back = place.put(new, place.take(stored))
        assert torch.equal(back, stored)


def test_a_silenced_head_is_a_silenced_z(family):
    m = model(family)
    width = m.anatomy.head_dim
    path = m.anatomy.places[Site(1, "attn.o")].name.removesuffix(".weight")

    def silence(_, args):
        z = args[0].clone()
        z[..., width : 2 * width] = 0
        return (z, *args[1:])

    with torch.no_grad():
        plain = m.module(input_ids=IDS).logits
        hook = m.module.get_submodule(path).register_forward_pre_hook(silence)
        expected = m.module(input_ids=IDS).logits
        hook.remove()
        with m.installed(apply(Scale(0.0), m.weights, at="1.attn.o.h1")):
            found = m.module(input_ids=IDS).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_head_of_q_k_v_moves_its_own_z_only(family, part):
    m = model(family)
    width, share = m.anatomy.head_dim, m.anatomy.n_heads // m.anatomy.n_kv_heads
    if family == "olmo2" and part != "v":
        pytest.skip("norms over all of q and k mix their heads")
    path = m.anatomy.places[Site(1, "attn.o")].name.removesuffix(".weight")
    before = calls(m.module, path)[0]
    with m.installed(apply(lambda _, W: W.flip(0) + 0.5, m.weights, at=f"1.attn.{part}.h1")):
        after = calls(m.module, path)[0]
    moved = (before - after).abs().amax((0, 1)).view(-1, width).amax(1) > 1e-4
    mine = [1] if part == "q" else list(range(share, 2 * share))
    assert [h for h in range(m.anatomy.n_heads) if moved[h]] == mine


def test_check_passes_and_gives_everything_back(family, tied):
    m = model(family, tied)
    before = {n: p.clone() for n, p in m.module.named_parameters()}
    m.anatomy.check(m.module)
    assert all(torch.equal(p, before[n]) for n, p in m.module.named_parameters())


def swapped(anatomy: Anatomy, a: str, b: str) -> Anatomy:
    one, other = Site.parse(a), Site.parse(b)
    places = dict(anatomy.places)
    places[one], places[other] = places[other], places[one]
    return replace(anatomy, places=places)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1.attn.q", "1.attn.o"),
        ("1.attn.k", "1.attn.v"),
        ("1.mlp.up", "1.mlp.down"),
        ("0.mlp.up", "1.mlp.up"),
        ("0.attn.q", "2.attn.q"),
        ("1.attn.v", "1.mlp.up"),
        ("embed", "norm"),
    ],
)
def test_check_finds_two_places_swapped(family, a, b):
    m = model(family)
    with pytest.raises(RuntimeError, match=r"^(embed|norm|\d\.(attn|mlp)\.\w+) "):
        swapped(m.anatomy, a, b).check(m.module)


def test_check_finds_a_table_off_by_a_layer_or_a_tensor_unused(family):
    m = model(family)
    places = dict(m.anatomy.places)
    places[Site(1, "mlp.down")] = places[Site(2, "mlp.down")]
    with pytest.raises(RuntimeError, match=r"1\.mlp\.down"):
        replace(m.anatomy, places=places).check(m.module)
    m.module.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    names = [n for n, _ in m.module.named_parameters()]
    idle = Anatomy.of(m.module.config, names)
    assert Site.unnamed("idle") in idle.places
    with pytest.raises(RuntimeError, match=r"file:idle \(stored as idle\) was perturbed and the logits did not move"):
        idle.check(m.module)


def test_an_unrotated_key_bias_cancels_in_the_softmax():
    m = model("gpt2")
    with torch.no_grad():
        before = m.module(input_ids=IDS).logits
        with m.installed(apply(lambda _, b: b + 1.0, m.weights, at="*.attn.k.bias")):
            torch.testing.assert_close(m.module(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
        with m.installed(apply(lambda _, b: b + 1.0, m.weights, at="*.attn.q.bias")):
            assert not torch.allclose(m.module(input_ids=IDS).logits, before, atol=1e-2)


def test_geometry_is_read():
    a = model("llama").anatomy
    assert (a.n_layers, a.d_model, a.n_heads, a.n_kv_heads, a.head_dim, a.vocab) == (3, 32, 4, 2, 12, 100)
    assert a.head_slice(Site(0, "attn.o", 3)) == (slice(None), slice(36, 48))
    assert a.head_slice(Site(0, "attn.k", 1)) == (slice(12, 24),)
    with pytest.raises(ValueError, match=r"0\.attn\.k\.h2 does not exist: 0\.attn\.k has heads h0 to h1"):
        a.head_slice(Site(0, "attn.k", 2))
    with pytest.raises(ValueError, match=r"embed has no heads\. Heads are at attn\.q, attn\.k, attn\.v \(rows\)"):
        a.heads(Site(None, "embed"))


def test_activations_that_do_not_exist():
    a = model("llama").anatomy
    for site in (Site(4, "resid"), Site(3, "mid"), Site(0, "attn.o")):
        with pytest.raises(
            ValueError, match=r"'.*' matches no site.*Layers 0 to 3 have: attn\.out, attn\.z, mid, mlp\.out, resid"
        ):
            a.tap(site)
    for site in (Site(0, "resid", 1), Site(0, "attn.z", 4)):
        with pytest.raises(ValueError, match=r"does not exist: activations have heads at attn\.z, h0 to h3"):
            a.tap(site)
    parallel = model("gpt-neox").anatomy
    with pytest.raises(ValueError, match=r"'0\.mid' matches no site.*have: attn\.out, attn\.z, mlp\.out, resid\."):
        parallel.tap(Site(0, "mid"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_its_branches_give(family):
    """``resid + attn.out = mid`` and ``mid + mlp.out`` is the next stream; heads are slices of attn.z, which attn.o mixes."""
    live = model(family)
    a, seen = live.anatomy, {}
    sites = [*a.activation_sites(), Site(1, "attn.z", 3)]
    hooks = [a.tap(s).attach(live.module, lambda x, s=s: seen.update({s: x})) for s in sites]
    ids = torch.arange(20, 36)[None]
    with torch.no_grad():
        live.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    assert list(seen) == sorted(seen, key=a.order)
    for layer in range(a.n_layers):
        at = {part: seen[Site(layer, part)] for part in a.streams}
        after = seen[Site(layer + 1, "resid")]
        torch.testing.assert_close(at["resid"] + at["attn.out"] + at["mlp.out"], after, rtol=1e-4, atol=1e-4)
        if "mid" in at:
            torch.testing.assert_close(at["resid"] + at["attn.out"], at["mid"], rtol=1e-4, atol=1e-4)
        assert all(x.shape[-1] == a.width(Site(layer, part)) for part, x in at.items())
    z, w = seen[Site(1, "attn.z")], live.weights["1.attn.o"]
    assert torch.equal(z[..., 3 * a.head_dim : 4 * a.head_dim], seen[Site(1, "attn.z", 3)])
    if a.streams["attn.z"][0] == a.streams["attn.out"][0] and "1.attn.o.bias" not in live.weights:
        torch.testing.assert_close(z @ w.T, seen[Site(1, "attn.out")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_is_changed_where_it_is_seen(family):
    live = model(family)
    a, ids = live.anatomy, torch.arange(20, 36)[None]

    def logits():
        with torch.no_grad():
            return live.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    before = logits()
    for site in [*a.activation_sites(), Site(1, "attn.z", 3)]:
        for change, moves in ((lambda x: x.clone(), False), (lambda x: x + torch.linspace(-1, 1, x.shape[-1]), True)):
            hook = a.tap(site).attach(live.module, change)
            moved = not torch.equal(logits(), before)
            hook.remove()
            assert moved is moves, site
    assert torch.equal(logits(), before)


def test_a_family_without_a_table_and_a_tensor_that_is_not_there():
    module, _ = tiny("llama")
    names = [n for n, _ in module.named_parameters()]
    with pytest.raises(
        ValueError, match=r"here is a llama of 3 layers but lacks 2 of its tensors, first model\.norm\.weight"
    ):
        Anatomy.of(module.config, [n for n in names if n not in ("model.norm.weight", names[-2])], where="here")
    module.config.model_type = "bloom"
    with pytest.raises(
        ValueError, match=r"here is a 'bloom' model, a family without a table\. Known: gemma2, .*added as data"
    ):
        Anatomy.of(module.config, names, where="here")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "place",
    [
        Place("w"),
        Place("w", transposed=True),
        Place("w", rows=slice(2, 5)),
        Place("w", rows=torch.tensor([4, 1, 3]), transposed=True),
        Place("w", expert=2),
        Place("w", expert=0, rows=slice(1, 4)),
        Place("w", expert=3, rows=slice(2, 6), transposed=True),
    ],
)
def test_positions_are_found_in_a_piece(place: Place, dtype: torch.dtype) -> None:
    shape = (6, 7) if place.expert is None else (4, 6, 7)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    at = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3).reshape(-1).nonzero().squeeze(1)
    mine, where = place.find(at.to(dtype), shape)
    own = place.take(stored)
    assert torch.equal(stored.reshape(-1)[at][mine], own.reshape(-1)[where])
    asked = torch.zeros(stored.numel(), dtype=torch.bool)
    asked[at] = True
    assert len(mine) == int(place.take(asked.view(shape)).sum())
    assert (mine.diff() > 0).all()

"""Experts are sites: in files one tensor each, in live modules packed together."""

import pytest
import torch
from torch.nn import functional

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.edits import Scale
from surgery.model import Model
from surgery.preflight.facts import Place, examine
from surgery.sites import Site, match
from surgery.weights import apply
from surgery.writing import write
from tests.families import SPARSE_FAMILIES, save_tiny, tiny

IDS = torch.arange(4, 36)[None]


@pytest.fixture(scope="module", params=SPARSE_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    return Checkpoint(save_tiny(family, tmp_path_factory.mktemp("sparse") / "base"))


@pytest.fixture(scope="module")
def live(base):
    return Model.load(base.folder)


def sparse(family):
    return [0, 1, 2] if family == "mixtral" else [0, 2]  # the others have a dense layer


def test_a_file_and_a_live_module_have_the_same_sites(family, base, live):
    assert list(base) == list(live.weights)
    assert all(torch.equal(base[s], live.weights[s]) for s in base)
    assert not any(s.is_unnamed for s in base)
    experts = [
        f"{layer}.mlp.e{e}.{part}" for layer in sparse(family) for e in range(4) for part in ("down", "gate", "up")
    ]
    assert [str(s) for s in match("*.mlp.e*.*", base)] == experts
    assert [s.layer for s in match("*.mlp.router", base)] == sparse(family)
    assert len(base.tensors) == len(base)  # one tensor each
    linear = base.anatomy.linear_sites()
    assert {Site.parse(e) for e in experts} <= set(linear)
    assert not any("router" in s.part or "norm" in s.part for s in linear)
    if family != "mixtral":
        assert {Site(1, f"mlp.{part}") for part in ("gate", "up", "down")} <= set(linear)


def test_an_expert_is_the_matrix_the_module_multiplies_by(family, live):
    """The MLP of the last layer restated from the sites: the chosen experts, weighted, and the shared one."""
    w, block = live.weights, live.module.model.layers[2].mlp
    seen = {}
    hook = block.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        live.module(input_ids=IDS)
    hook.remove()
    x = seen["x"][0]

    def mlp(name, x):
        gate, up, down = (w[f"2.mlp.{name}.{part}"] for part in ("gate", "up", "down"))
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

    chances = functional.linear(x, w["2.mlp.router"]).softmax(-1)
    top, chosen = chances.topk(2, dim=-1)
    if family == "mixtral" or live.module.config.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for share, expert in zip(top[token], chosen[token], strict=True):
            expected[token] += share * mlp(f"e{int(expert)}", x[token])
    if family == "qwen2-moe":
        expected += functional.linear(x, w["2.mlp.shared_router"]).sigmoid() * mlp("shared", x)
    assert len(chosen.unique()) == 4
    torch.testing.assert_close(seen["y"].reshape_as(x), expected, rtol=1e-4, atol=1e-4)


def test_check_passes(live):
    before = {n: p.clone() for n, p in live.module.named_parameters()}
    live.anatomy.check(live.module)
    assert all(torch.equal(p, before[n]) for n, p in live.module.named_parameters())


def test_check_finds_an_expert_mistaken(live):
    places = dict(live.anatomy.places)
    one, other = Site(0, "mlp.e1.down"), Site(2, "mlp.e1.down")
    places[one], places[other] = places[other], places[one]
    wrong = Anatomy(**{**vars(live.anatomy), "places": places})
    with pytest.raises(RuntimeError, match=r"^[02]\.mlp\.e1\.down \(stored as model\.layers"):
        wrong.check(live.module)


def test_an_edit_of_one_expert_moves_its_tensor_alone(base, live, tmp_path):
    edited = apply(Scale(0.0), base, "2.mlp.e3.down")
    write(edited, tmp_path / "silenced")
    after = Checkpoint(tmp_path / "silenced")
    moved = [n for n in base.tensors if not torch.equal(base.stored(n), after.stored(n))]
    assert moved == [base.anatomy.places[Site(2, "mlp.e3.down")].name]
    assert ".3." in moved[0]
    with torch.no_grad():
        plain = live.module(input_ids=IDS).logits
        with live.installed(apply(Scale(0.0), live.weights, "2.mlp.e3.down")):
            installed = live.module(input_ids=IDS).logits
        reloaded = Model.load(tmp_path / "silenced").module(input_ids=IDS).logits
    torch.testing.assert_close(installed, reloaded, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, installed, atol=1e-3)


def test_the_algebra(family, base, tmp_path):
    tuned = Checkpoint(save_tiny(family, tmp_path / "tuned", seed=1, shards=2))
    written = write(base + (tuned - base), tmp_path / "again")
    assert written.hashes == tuned.hashes()
    half = base + 0.5 * (tuned - base)
    torch.testing.assert_close(half["0.mlp.e1.up"], (base["0.mlp.e1.up"] + tuned["0.mlp.e1.up"]) / 2, rtol=0, atol=1e-6)


def test_experts_packed_in_the_file(base, live, tmp_path):
    """As `save_pretrained(save_original_format=False)` leaves them."""
    live.module.save_pretrained(tmp_path / "packed", save_original_format=False)
    packed = Checkpoint(tmp_path / "packed")
    assert list(packed) == list(base)
    assert len(packed.tensors) < len(base.tensors)
    assert all(torch.equal(packed[s], base[s]) for s in base)
    facts, _ = examine("packed", Place(packed.folder))
    assert facts is not None
    assert facts.shapes() == {str(s): tuple(shape) for s, shape in packed.shapes().items()}
    write(apply(Scale(2.0), packed, ["0.mlp.e1.down", "0.mlp.e2.up"]), tmp_path / "moved")
    moved = Checkpoint(tmp_path / "moved")
    for site in base:
        factor = 2.0 if str(site) in ("0.mlp.e1.down", "0.mlp.e2.up") else 1.0
        assert torch.equal(moved[site], factor * base[site])


def test_put_is_the_inverse_of_take(live):
    for site, place in live.anatomy.places.items():
        stored = live.weights.parameter(site).detach()
        value = torch.randn(live.weights.shape(site))
        new = place.put(stored, value)
        assert torch.equal(place.take(new), value)
        assert torch.equal(place.put(new, place.take(stored)), stored)


def test_an_expert_that_is_not_there(family):
    module, _ = tiny(family)
    names = [n for n, _ in module.named_parameters() if "layers.2.mlp.experts.down_proj" not in n]
    with pytest.raises(
        ValueError, match=r"lacks 4 of its tensors, first model\.layers\.2\..*experts\.0\.(w2|down_proj)"
    ):
        Anatomy.of(module.config, names)

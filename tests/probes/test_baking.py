"""What is baked does what the steering does, to rounding, and what weights cannot hold is refused with the reason."""

import pytest
import torch

from probes.baking import Agreement, BakingError, agreement, bake
from probes.steering import Steering, steered
from surgery.model import Model
from surgery.sites import Site
from surgery.writing import write
from tests.families import FAMILIES, HEAD_WIDTH, HIDDEN, SPARSE_FAMILIES, save_tiny, tiny

POST_NORM = ("gemma2", "gemma3", "olmo2")
BIASED = ("gpt2", "gpt-neox")  # a bias wherever something is written


def vector(width=HIDDEN, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def model_of(family, **options):
    return Model(*tiny(family, **options))


def proved(model, *steerings, **options):
    """Baked, and the logits as steered: at most 1e-4 of the effect off."""
    baked = bake(list(steerings), model, **options)
    proof = agreement(model, list(steerings), baked)
    assert proof.holds
    assert proof.effect > 0.05, proof
    assert proof.difference < 1e-3 * proof.effect, proof
    return baked


def everywhere(direction, **options):
    return Steering(direction, over="all", **options)


@pytest.mark.parametrize("family", FAMILIES + SPARSE_FAMILIES)
def test_what_a_head_gives_is_taken_out_of_what_is_read(family):
    """At attn.z, before any norm: exact in every family."""
    model = model_of(family)
    width = model.anatomy.head_dim
    for strength in (1.0, 0.4):
        head = everywhere(vector(width), at="1.attn.z.h2", how="ablate", strength=strength)
        whole = everywhere(vector(width * model.anatomy.n_heads), at="0.attn.z", how="ablate", strength=strength)
        baked = proved(model, head, whole)
        columns = baked["1.attn.o.h2"].float() - model.weights["1.attn.o.h2"].float()
        assert columns.abs().max() > 0.01
        others = [h for h in range(model.anatomy.n_heads) if h != 2]
        assert all(
            torch.equal(baked[f"1.attn.o.h{h}"].float(), model.weights[f"1.attn.o.h{h}"].float()) for h in others
        )


@pytest.mark.parametrize("family", [f for f in FAMILIES + SPARSE_FAMILIES if f not in POST_NORM])
def test_what_a_branch_adds_without_a_direction(family):
    model = model_of(family)
    for strength in (1.0, 0.4):
        proved(model, everywhere(vector(), at=["1.attn.out", "0-1.mlp.out"], how="ablate", strength=strength))


@pytest.mark.parametrize("family", POST_NORM)
def test_behind_a_norm_the_direction_goes_by_its_gain(family):
    """The stream no longer gets the direction; the rest of what is added is only rescaled."""
    model = model_of(family)
    u = vector() / vector().norm()
    for site, matrix in (("1.attn.out", "1.attn.o"), ("1.mlp.out", "1.mlp.down")):
        steering = everywhere(u, at=site, how="ablate")
        with pytest.raises(BakingError, match=rf"{site}: a norm comes after {matrix} and rescales.*closely=True"):
            bake(steering, model)
        baked = bake(steering, model, closely=True)
        quarter = bake(everywhere(u, at=site, how="ablate", strength=0.25), model, closely=True)
        seen = []
        ids = torch.tensor([model.prompt_ids("one")])
        hook = model.anatomy.tap(Site.parse(site)).attach(model.module, lambda h, seen=seen: seen.append(h[0]))
        with torch.no_grad():
            model.module(input_ids=ids)
            with model.installed(baked):
                model.module(input_ids=ids)
            with model.installed(quarter):
                model.module(input_ids=ids)
        hook.remove()
        plain, got, quarter = seen
        assert ((plain @ u).abs() > 1e-2).any()
        torch.testing.assert_close(got @ u, torch.zeros(len(got)), atol=1e-4, rtol=0)
        ratio = (quarter @ u) / (plain @ u)  # three quarters of it, but for the norm's scale
        assert ((ratio > 0.7) & (ratio < 1.3)).all()
        assert not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)


@pytest.mark.parametrize("family", BIASED)
def test_additions_go_into_biases(family):
    model = model_of(family, tied=False)
    sites = ["1.attn.out", "2.mlp.out", "2.resid", "3.resid"] + ["1.mid"] * (family == "gpt2")
    for site in sites:
        proved(model, everywhere(vector(), at=site, strength=0.5))
    proved(model, *(everywhere(vector(seed=i), at=site, strength=-2, units="raw") for i, site in enumerate(sites)))
    proved(model, everywhere(vector(), at="0.resid", strength=0.5))
    width = model.anatomy.head_dim
    proved(model, everywhere(vector(width), at="1.attn.z.h1", strength=0.5))
    proved(model, everywhere(vector(4 * width), at="2.attn.z", strength=0.5))


@pytest.mark.parametrize("family", BIASED)
def test_clamping_is_both(family):
    model = model_of(family)
    for site, width in (("1.attn.out", HIDDEN), ("2.mlp.out", HIDDEN), ("1.attn.z.h1", model.anatomy.head_dim)):
        for strength in (0.7, 0.0):
            proved(model, everywhere(vector(width), at=site, how="clamp", strength=strength))


@pytest.mark.parametrize("family", FAMILIES + SPARSE_FAMILIES)
def test_a_clamp_to_nothing_needs_no_bias(family):
    model = model_of(family)
    at = ["1.attn.z.h1", *([] if family in POST_NORM else ["1.attn.out", "2.mlp.out"])]
    for site, width in zip(at, (model.anatomy.head_dim, HIDDEN, HIDDEN), strict=False):
        proved(model, everywhere(vector(width), at=site, how="clamp", strength=0.0))


def test_several_are_baked_in_their_order():
    """Directions that are not at right angles do not commute."""
    model = model_of("gpt2")
    for site, width in (("1.attn.z", HIDDEN), ("1.attn.out", HIDDEN), ("1.attn.z.h1", HIDDEN // 4)):
        u, v = vector(width), vector(width) + vector(width, seed=1)
        proved(model, everywhere(u, at=site, how="ablate"), everywhere(v, at=site, how="ablate", strength=0.7))
    add, ablate = everywhere(vector(), at="1.attn.out"), everywhere(vector() + 1, at="1.attn.out", how="ablate")
    proved(model, add, ablate)
    proved(model, ablate, add)
    proved(model, everywhere(vector(8), at="1.attn.z.h1"), everywhere(vector(), at="1.attn.z"), add, ablate)
    proved(model, everywhere(vector(8), at="1.attn.z.h1"), everywhere(vector(), at="2.attn.z", how="ablate"))


def test_values_have_a_bias_that_every_head_of_a_group_gets():
    model = model_of("qwen2")
    group = vector(2 * HEAD_WIDTH).view(2, 1, HEAD_WIDTH).expand(2, 2, HEAD_WIDTH).reshape(-1)
    proved(model, everywhere(group, at="1.attn.z", strength=0.5))
    with pytest.raises(BakingError, match="heads that share a value share its bias"):
        bake(everywhere(vector(4 * HEAD_WIDTH), at="1.attn.z"), model)
    with pytest.raises(BakingError, match="heads that share a value"):
        bake(everywhere(vector(HEAD_WIDTH), at="1.attn.z.h0"), model)


@pytest.mark.parametrize("family", [f for f in FAMILIES + SPARSE_FAMILIES if f not in POST_NORM])
def test_a_stream_without_a_direction_from_its_beginning(family):
    model = model_of(family, tied=False)
    stream = [s for s in model.anatomy.activation_sites() if s.part in ("resid", "mid")]
    for count in (1, len(stream)) if family != "llama" else (1, 4, len(stream)):
        baked = proved(model, everywhere(vector(), at=stream[:count], how="ablate"))
    assert {str(s) for s in baked.changed_from(model.weights)} >= {"embed", "0.attn.o", "2.attn.o"}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("mistral", False), ("gpt2", True)])
def test_the_embedding_holds_what_is_added_first(family, tied):
    """That of the tokens where it is not the head as well, that of the positions where there is one."""
    proved(model_of(family, tied=tied), everywhere(vector(), at="0.resid", strength=0.5))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_baked_can_be_written(family, tmp_path):
    model = Model.load(save_tiny(family, tmp_path / "model"))
    steering = everywhere(vector(HEAD_WIDTH if family == "llama" else HIDDEN // 4), at="1.attn.z.h2", how="ablate")
    ids = torch.tensor([model.prompt_ids("one")])
    with torch.no_grad():
        with steered(model, steering):
            wanted = model.module(input_ids=ids).logits
        write(bake(steering, model), tmp_path / "out")
        got = Model.load(tmp_path / "out").module(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_point_alone_takes_raw_strengths():
    model = model_of("gpt2")
    steering = everywhere(vector(), at="1.attn.out", units="raw", strength=0.5)
    alone, proof = bake(steering, model.weights), bake(steering, model)
    assert torch.equal(alone["1.attn.o.bias"], proof["1.attn.o.bias"])
    torch.testing.assert_close(alone["1.attn.o.bias"], model.weights["1.attn.o.bias"] + 0.5 * vector())
    with pytest.raises(ValueError, match="Weights alone do not say how long a stream is"):
        bake(everywhere(vector(), at="1.attn.out"), model.weights)


def test_half_precision_agrees_to_its_rounding():
    model, steering = model_of("gpt2", dtype=torch.bfloat16), everywhere(vector(), at="1.attn.out")
    assert agreement(model, steering, bake(steering, model)).holds
    with pytest.raises(BakingError, match="do not do what the steering does"):  # swallowed: no bias moves by so little
        bake(everywhere(vector(), at="1.attn.out", strength=1e-3, units="raw"), model)


def test_a_proof_holds_to_a_hundredth_of_the_effect():
    assert Agreement(difference=0.009, effect=1.0, size=10.0, rounding=0.0).holds
    assert not Agreement(difference=0.011, effect=1.0, size=10.0, rounding=0.0).holds


def test_a_proof_that_fails(monkeypatch):
    """A bias in the wrong layer is found out."""
    import probes.baking

    model = model_of("gpt2")
    true = probes.baking._add
    monkeypatch.setattr(probes.baking, "_add", lambda site, v, w: true(Site(0, site.part), v, w))
    with pytest.raises(
        BakingError, match="The baked weights do not do what the steering does: baked and steered logits differ"
    ):
        bake(everywhere(vector(), at="1.attn.out"), model)


def resid(count, seed=0, **options):
    return everywhere(vector(seed=seed), at=["0.resid", "0.mid", "1.resid"][:count], how="ablate", **options)


@pytest.mark.parametrize(
    ("family", "steering", "message"),
    [
        ("gpt2", Steering(vector(), at="1.attn.out"), "over=completion: weights act on every token alike"),
        ("gpt2", Steering(vector(), at="1.attn.out", over=("all", "thinking")), "weights act on every token alike"),
        ("gpt2", everywhere(vector(), at="1.attn.out", strength=[1.0, 2.0]), "differ from row to row"),
        ("gpt2", everywhere(None, at="1.attn.out", how=torch.relu), "A function of rows cannot be baked"),
        ("llama", everywhere(vector(), at="1.attn.out"), r"no bias at 1\.attn\.o\.bias in this llama"),
        ("llama", everywhere(vector(), at="2.resid"), r"no bias at 1\.mlp\.down\.bias in this llama"),
        ("mixtral", everywhere(vector(), at="1.mlp.out"), r"no bias at 1\.mlp\.down\.bias in this mixtral"),
        ("llama", everywhere(vector(HEAD_WIDTH), at="1.attn.z.h0"), "a bias neither at attn.v nor at attn.o"),
        ("llama", everywhere(vector(HEAD_WIDTH), at="1.attn.z.h0", how="clamp"), "no bias behind the heads of this llama"),
        ("gpt2", [everywhere(vector(8), at="1.attn.z.h0"), everywhere(vector(32), at="1.attn.z", how="ablate")], "Bake a single"),
        ("llama", everywhere(vector(), at="1.attn.out", how="clamp"), r"no bias at 1\.attn\.o\.bias"),
        ("gemma2", everywhere(vector(), at="1.attn.out"), "a norm that only scales cannot add a vector"),
        ("gpt2", everywhere(vector(), at="1.mid", how="clamp"), "a stream is clamped by what comes to it"),
        ("llama", everywhere(vector(), at="0.resid"), "the embedding is also the head here"),
        ("llama", resid(3), "the embedding is also the head here"),
        ("llama", everywhere(vector(), at="1.mid", how="ablate"), r"steer 0\.resid as well, and all others up to 1\.mid"),
        ("llama", resid(2, strength=0.5), "the same at every site, and the strength 1"),
        ("llama", everywhere({Site(0, "resid"): vector(), Site(0, "mid"): vector(seed=1)}, at=["0.resid", "0.mid"], how="ablate"), "the same at every"),
        ("llama", [resid(1), everywhere(vector(), at="1.attn.out", how="ablate")], "bake one after the other"),
        ("llama", [resid(3), resid(3, seed=1)], "Several directions.*bake one after the other"),
        ("llama", [resid(1), resid(1, seed=1)], "Several directions.*bake one after the other"),
    ],
)  # fmt: skip
def test_what_weights_cannot_hold(family, steering, message):
    with pytest.raises(BakingError, match=message):
        bake(steering, model_of(family))


def test_an_adapter_in_the_module():
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    peft.get_peft_model(model.module, peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="LlamaForCausalLM has an adapter beside its own tensors"):
        bake(everywhere(vector(), at="1.attn.out", how="ablate"), model)


def test_a_scaled_embedding_and_quantised_weights():
    with pytest.raises(BakingError, match="this family scales its embedding"):
        bake(everywhere(vector(), at="0.resid"), model_of("gemma3", tied=False))
    model = model_of("gpt2")
    parameter = model.module.transformer.h[1].attn.c_proj.weight
    parameter.requires_grad_(False)
    parameter.data = parameter.data.to(torch.int8)
    with pytest.raises(
        ValueError, match=r"1\.attn\.o is stored as torch\.int8: such numbers are codes of a quantised model"
    ):
        bake(everywhere(vector(), at="1.attn.out", how="ablate"), model.weights)

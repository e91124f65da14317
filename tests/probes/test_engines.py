"""torch, nnsight and TransformerLens read the same activations, in every family."""

import pytest
import torch

from probes.activations import collect
from probes.attribution import ablated
from probes.engines import forward, reader
from probes.recorder import recording
from probes.steering import steered
from surgery.model import Model
from surgery.sites import Site
from tests.families import FAMILIES, tiny

ROWS = [[1, 5, 9, 30, 41, 22, 8, 70], [1, 6, 7], [1, 90, 44, 45, 46, 47, 12]]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # TransformerLens computes attention eagerly


def real(activations):
    return {site: torch.cat([x[i, : len(row)] for i, row in enumerate(ROWS)]) for site, x in activations.items()}


@pytest.mark.parametrize("engine", ["nnsight", "transformer-lens"])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_all_engines_read_the_same(family, engine):
    model = Model(*tiny(family))
    sites = [*model.anatomy.activation_sites(), Site(1, "attn.z", 3), Site(0, "attn.z", 0)]
    expected, found = (forward(model, ROWS, sites, e) for e in ("torch", engine))
    assert list(found) == sites
    for site in sites:
        assert found[site].shape == (3, 8, model.anatomy.width(site))
        assert not found[site].requires_grad
    expected, found = real(expected), real(found)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site], **CLOSE, msg=lambda m, s=site: f"{s}: {m}")


@pytest.mark.parametrize("engine", ["nnsight", "transformer-lens"])
def test_an_engine_stops_at_the_last_site(engine, monkeypatch):
    model = Model(*tiny("llama"))
    called = []
    kind = type(model.module.model.layers[0].mlp.down_proj)
    plain = kind.forward

    def counted(self, x):
        called.append(self)
        return plain(self, x)

    monkeypatch.setattr(kind, "forward", counted)
    read = reader(model, engine)
    read(ROWS, [Site(3, "resid")])
    whole = len(called)
    called.clear()
    read(ROWS, [Site(0, "mlp.out"), Site(0, "attn.z", 1)])
    assert 0 < len(called) <= whole / 3 + 1


def test_one_reader_for_many_batches_sees_edits():
    model = Model(*tiny("phi3"))
    readers = [reader(model, engine) for engine in ("torch", "nnsight", "transformer-lens")]
    sites = [Site(1, "attn.z"), Site(2, "mlp.out")]
    for factor in (1.0, 0.5):
        with torch.no_grad():
            model.weights.parameter("0.attn.q").mul_(factor)
        expected, *others = (real(read(ROWS, sites)) for read in readers)
        for found in others:
            for site in sites:
                torch.testing.assert_close(found[site], expected[site], **CLOSE)


@pytest.mark.parametrize("engine", ["nnsight", "transformer-lens"])
def test_the_rows_of_collect(engine):
    model = Model(*tiny("gemma3"))
    runs = [model.transcript("q" * i, f"<think>{'ab' * i}</think>{i}") for i in (3, 1, 2)]
    asked = {"at": ["1.mid", "*.attn.z.h2"], "over": ("prompt", "thinking"), "pool": "mean", "batch_size": 2}
    expected, found = collect(model, runs, **asked), collect(model, runs, **asked, engine=engine)
    assert torch.equal(found.transcript, expected.transcript)
    for site in expected.sites:
        torch.testing.assert_close(found[site], expected[site], **CLOSE)


@pytest.mark.parametrize("engine", ["nnsight", "transformer-lens"])
def test_what_hooks_change_is_refused(engine):
    """A window runs the weights without the module's hooks: its rows would be of the model as it is unsteered."""
    model = Model(*tiny("llama"))
    run = [model.transcript("ab", "cd")]
    with steered(model, torch.ones(32), at="1.resid"), pytest.raises(ValueError, match=f"{engine}.*engine='torch'"):
        collect(model, run, at="2.resid", engine=engine)
    with ablated(model, "1.attn.o.h2"), pytest.raises(ValueError, match="engine='torch'"):
        collect(model, run, at="2.resid", engine=engine)
    with recording(model, at="1.resid"), pytest.raises(ValueError, match="engine='torch'"):
        collect(model, run, at="2.resid", engine=engine)
    model.module(
        torch.tensor([run[0].ids]), output_hidden_states=True
    )  # hangs hooks of transformers' own on the module
    assert len(collect(model, run, at="2.resid", engine=engine))


def test_serialized_as_for_a_server():
    model = Model(*tiny("qwen2"))
    sites = [Site(0, "resid"), Site(1, "attn.z", 2), Site(2, "mid")]
    expected, found = forward(model, ROWS, sites), forward(model, ROWS, sites, "nnsight", remote="local")
    for site in sites:
        torch.testing.assert_close(real(found)[site], real(expected)[site], **CLOSE)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_read():
    model = Model(*tiny("llama"))
    with pytest.raises(ValueError, match="There is no engine 'jax': choose torch, nnsight or transformer-lens"):
        reader(model, "jax")
    for engine in ("torch", "transformer-lens"):
        with pytest.raises(ValueError, match=f"remote=True is for engine='nnsight'; '{engine}' runs here"):
            reader(model, engine, remote=True)
    with pytest.raises(ValueError, match="A server knows models by hub id, and this one was not loaded by any"):
        reader(model, "nnsight", remote=True)
    for engine in ("nnsight", "transformer-lens"):
        with pytest.raises(ValueError, match=r"'9\.mid' matches no site"):
            forward(model, ROWS, [Site(9, "mid")], engine)

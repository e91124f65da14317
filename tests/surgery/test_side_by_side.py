"""Tensors are written side by side, one on each core: nothing of that shows in what is written, said or left behind."""

import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import Checkpoint, Scale, apply, merge, write, writing
from tests.families import FAMILIES, save_tiny
from tests.siblings import sibling, siblings


@pytest.fixture
def on_cores(monkeypatch):
    """Says how many cores torch has, and makes threads change places as often as they can."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    monkeypatch.setattr(writing, "_CHUNK", 64)
    sys.setswitchinterval(1e-6)
    yield torch.set_num_threads
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_cores_does_not_show(family, rounding, on_cores, tmp_path):
    base = Checkpoint(save_tiny(family, tmp_path / "base", shards=2, dtype=torch.bfloat16))
    other = Checkpoint(sibling(base.folder, tmp_path / "other", seed=1))
    point = apply(Scale(0.5), base + 0.3 * (other - base), "1.attn.o")  # by rows, and one that is computed whole
    found = []
    for cores in (1, 5):
        on_cores(cores)
        written = write(point, tmp_path / f"on {cores}", rounding=rounding)
        assert torch.get_num_threads() == cores
        words = [word for word in written.checks if "logits" not in word]  # their sums may depend on the cores
        found.append(
            (files(written.folder), list(written.kept.items()), list(written.hashes.items()), written.hash, words)
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "nearswap"])
def test_nor_does_it_in_a_merge(method, on_cores, tmp_path):
    home = siblings("llama", tmp_path)
    others = ["a"] if method == "nearswap" else ["a", "b"]
    recipe = {
        "merge_method": method,
        "base_model": str(home / "base"),
        "models": [{"model": str(home / name), "parameters": {"weight": 0.5, "density": 0.4}} for name in others],
        "parameters": {"t": 0.01} if method == "nearswap" else {},
        "dtype": "float32",
    }
    if method in ("linear", "nearswap"):
        recipe["models"] = [{"model": m["model"], "parameters": {"weight": 0.5}} for m in recipe["models"]]
    if method == "linear":
        del recipe["base_model"]
    made = []
    before = torch.random.get_rng_state()
    for cores in (1, 5):
        on_cores(cores)
        made.append(merge(recipe, tmp_path / f"on {cores}", seed=3).hashes)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert list(made[0].items()) == list(made[1].items())


def test_of_several_faults_the_first_in_the_file_is_told(on_cores, tmp_path):
    source = save_tiny("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    order = [t.name for t in sorted(Checkpoint(source).tensors.values(), key=lambda t: t.begin)]
    first, last = order[0], order[-1]
    tensors[first].view(-1)[-1] = tensors[last].view(-1)[0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    site = next(site for site, place in Checkpoint(source).anatomy.places.items() if place.name == first)
    on_cores(5)
    for _ in range(5):
        with pytest.raises(ValueError, match=f"{site} has 1 values"):
            write(apply(Scale(0.5), Checkpoint(source), "1.mlp.up"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tensors_that_are_there_whole_come_one_at_a_time_and_have_all_cores(on_cores, tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    most, cores = [], []
    at = set()

    def slow(site, W):
        at.add(site)
        most.append(len(at))
        cores.append(torch.get_num_threads())
        time.sleep(0.01)
        at.discard(site)
        return W * 0.5

    on_cores(5)
    write(apply(slow, base, "*.mlp.up"), tmp_path / "out")
    assert len(most) == base.anatomy.n_layers
    assert set(most) == {1}
    assert set(cores) == {5}


def test_when_one_tensor_fails_the_others_are_given_up(on_cores, tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    seen = []

    def broken(site, W):
        seen.append(site)
        raise ZeroDivisionError(str(site))

    on_cores(2)
    with pytest.raises(ZeroDivisionError):
        write(apply(broken, base, "*.*.*"), tmp_path / "out")
    assert len(seen) < len(apply(broken, base, "*.*.*").changed_from(base))
    assert torch.get_num_threads() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["base"]

"""Tensors are written side by side, one on each core: nothing of that shows in what is written, said or left behind."""

import json
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from surgery import Checkpoint, Scale, apply, merge, write, writing
from surgery.record import Record, RecordError, verify
from surgery.reverse import Reverse
from surgery.tensorfile import TensorFile
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


def test_edits_are_applied_in_order_on_the_thread_that_asked(on_cores, tmp_path):
    """So that one that draws, counts, or uses what its caller switched off gives the same as ever."""
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    other = Checkpoint(sibling(base.folder, tmp_path / "other", seed=1))
    layer = torch.nn.Linear(32, 32)
    drawn = []

    def draws(site, W):
        drawn.append(site)
        return (W @ layer.weight[:, : W.shape[1]].float()[: W.shape[1]]) + 0.01 * torch.randn_like(W)

    found = []
    for cores in (1, 5):
        on_cores(cores)
        torch.manual_seed(0)
        with torch.no_grad():
            point = apply(draws, base + 0.3 * (other - base), ["*.attn.q", "*.attn.k"])
            found.append(write(point, tmp_path / f"on {cores}").hashes)
    assert found[0] == found[1]
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]


def test_what_is_read_by_rows_has_one_core_whatever_is_there_whole(on_cores, tmp_path, monkeypatch):
    """The threads of a file keep to one core each, though a whole tensor of it has them all."""
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    other = Checkpoint(sibling(base.folder, tmp_path / "other", seed=1))
    seen = []
    real = writing._Tally.add

    def add(self, *given):
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return real(self, *given)

    monkeypatch.setattr(writing._Tally, "add", add)
    on_cores(4)
    write(apply(Scale(0.5), base + 0.3 * (other - base), ["embed", "0.attn.q"]), tmp_path / "out")
    assert set(seen) == {(True, 4), (False, 1)}


def test_unaligned_tensors_are_read_once_by_each_thread(on_cores, unchecked, tmp_path, monkeypatch):
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    raw = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)  # of odd length
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    other = Checkpoint(sibling(base, tmp_path / "other", seed=1))
    asked = []
    real = TensorFile.__getitem__

    def get(self, name):
        asked.append((threading.get_ident(), str(self.path), name))
        return real(self, name)

    monkeypatch.setattr(TensorFile, "__getitem__", get)
    on_cores(4)
    start = Checkpoint(base)
    job = writing._Job(start + 0.3 * (other - start), start, None, None, Reverse(start))
    job.write_file(tmp_path / "model.safetensors", tqdm(disable=True))
    assert len(asked) == len(set(asked))


def test_a_record_by_another_hash_is_read_and_not_compared(tmp_path):
    folder = write(Checkpoint(save_tiny("llama", tmp_path / "base")), tmp_path / "out").folder
    path = Record("edit", {}).save(folder)
    said = json.loads(path.read_text())
    assert said.pop("hash") == "BLAKE3"
    path.write_text(json.dumps(said))
    assert Record.load(folder).command == "edit"
    with pytest.raises(RecordError, match="knows its outputs by SHA-256"):
        verify(folder)

"""A vector survives its file."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, read_vector, save_delta
from surgery.edits import Scale
from surgery.headers import DELTA as FILE
from surgery.lowrank import Adapter, save_adapter, truncated
from surgery.model import Model
from surgery.tensorfile import CheckpointError
from surgery.weights import apply
from tests.families import FAMILIES, save_tiny


def sparse_edit(_, W):
    edited = W.clone(memory_format=torch.contiguous_format)
    edited.view(-1)[::7] += 0.5
    return edited


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_and_dense_come_back(family, tmp_path):
    base = Checkpoint(save_tiny(family, tmp_path / "base"))
    tuned = apply(sparse_edit, apply(Scale(0.5), base, "*.attn.o"), ["*.mlp.down", "norm"])
    delta = tuned - base
    saved = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash=base.hash()))
    assert saved.base_hash == base.hash()
    assert set(saved) == tuned.changed_from(base)
    for site in saved:
        assert torch.equal(saved[site], delta[site])
        assert torch.equal(saved.rows(site, slice(3, 9)), delta[site][3:9])
        assert saved.shape(site) == base.shape(site)
        torch.testing.assert_close((base + saved)[site], tuned[site], rtol=0, atol=1e-6)
    assert "embed" not in saved
    assert torch.equal((base + saved)["embed"], base["embed"])
    dense = sum(base.shape(s).numel() for s in saved if s.part == "attn.o")
    sparse = sum(int((delta[s] != 0).sum()) for s in saved if s.part != "attn.o")
    assert saved.nonzero == dense + sparse
    assert set(saved.keep("1.attn.o")) == {s for s in saved if str(s) == "1.attn.o"}
    again = StoredDelta(save_delta(saved * 2.0, tmp_path / "twice", base_hash="x"))
    assert all(torch.equal(again[s], 2 * delta[s]) for s in again)
    assert (tmp_path / "delta" / FILE).stat().st_mode & 0o777 == 0o644


def test_the_base_is_known_from_the_change(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    model = Model.load(tmp_path / "base")
    change = apply(Scale(0.5), base, "*.attn.o") - base
    for number, delta in enumerate((change, 2 * change, change.keep("1.*.*"), change + change)):
        saved = StoredDelta(save_delta(delta, tmp_path / str(number)))
        assert saved.base_hash == base.hash()
        assert StoredDelta(save_delta(saved, tmp_path / f"{number} again")).base_hash == base.hash()
    assert StoredDelta(save_delta(change, tmp_path / "said", base_hash="x")).base_hash == "x"
    for unknown in (apply(Scale(0.5), model.weights, "*.attn.o") - model.weights, 2 * StoredDelta(tmp_path / "0")):
        with pytest.raises(ValueError, match=r"does not know one checkpoint.*base_hash=Checkpoint\(folder\)\.hash"):
            save_delta(unknown, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_saved(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    with pytest.raises(ValueError, match="The two models are identical: there is no change to save"):
        save_delta(base - Checkpoint(tmp_path / "base"), tmp_path / "d", base_hash="x")
    with pytest.raises(ValueError, match="The two models are identical"):
        save_delta(base - base, tmp_path / "d", base_hash="x")
    with pytest.raises(ValueError, match=r"The change at 1\.mlp\.up is NaN or infinite; nothing was written"):
        save_delta(apply(lambda _, W: W * float("nan"), base, "1.mlp.up") - base, tmp_path / "d", base_hash="x")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_folders_that_hold_no_delta(tmp_path):
    with pytest.raises(CheckpointError, match=r"none holds no delta\.safetensors \(no such folder\)\. `surgery diff"):
        StoredDelta(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"\(nothing in it\)\. `surgery diff TUNED BASE --to VECTOR` writes one"):
        StoredDelta(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="not a delta: its format is None"):
        StoredDelta(tmp_path)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        StoredDelta(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    return tuple(Checkpoint(save_tiny("qwen2", home / name, seed=seed)) for name, seed in (("base", 0), ("tuned", 1)))


def test_every_form_says_what_it_holds(pair, tmp_path):
    base, tuned = pair
    delta = (tuned - base).keep(["0.**", "norm"]) + (apply(sparse_edit, base, "1.mlp.up") - base).keep("1.mlp.up")
    read = {
        form: StoredDelta(save_delta(delta, tmp_path / form, base_hash="b", form=form))
        for form in ("auto", "dense", "sparse")
    }
    for form, saved in read.items():
        assert list(saved) == list(delta)
        assert saved.errors == {}
        assert saved.factored() == []
        for site in delta:
            assert torch.equal(saved[site], delta[site])
            assert torch.equal(saved.rows(site, slice(2, 7)), delta[site][2:7])
            sparse = form == "sparse" or (form == "auto" and str(site) == "1.mlp.up")
            assert saved.form(site) == ("sparse" if sparse else "dense")
            assert saved.stored(site) == (int((delta[site] != 0).sum()) if sparse else delta[site].numel())
            with pytest.raises(ValueError, match=f"holds {site} {saved.form(site)}, not as factors"):
                saved.factors(site)
    size = {form: (tmp_path / form / FILE).stat().st_size for form in read}
    assert size["auto"] < min(size["dense"], size["sparse"])


def test_low_rank_comes_with_its_error(pair, tmp_path):
    base, tuned = pair
    delta = (tuned - base).keep(["*.mlp.up", "1.attn.q", "1.attn.q.bias"])
    expected, errors = truncated(delta, 4)
    saved = StoredDelta(save_delta(delta, tmp_path / "v", base_hash="b", form="low-rank", rank=4))
    assert set(saved.factored()) == set(expected)
    for site in expected:
        assert saved.form(site) == "low-rank"
        assert saved.errors[site] == errors[site]
        assert 0 < errors[site] < 1
        assert saved.rank(site) == 4
        assert torch.equal(saved[site], expected[site])
        left, right = saved.factors(site)
        assert torch.equal(saved.rows(site, slice(3, 9)), left[3:9] @ right)
        assert saved.stored(site) == 4 * sum(delta.shape(site))
    assert torch.equal(saved["1.attn.q.bias"], delta["1.attn.q.bias"])
    assert saved.form("1.attn.q.bias") == "dense"
    metadata = safe_open(tmp_path / "v" / FILE, framework="pt").metadata()  # by another reader
    assert json.loads(metadata["errors"]) == {str(s): e for s, e in errors.items() if s in expected}
    whole = StoredDelta(save_delta(delta, tmp_path / "w", base_hash="b", form="low-rank", rank=30))
    assert all(torch.equal(whole[s], delta[s]) for s in delta), (
        "factors that would be larger than the matrix are not used"
    )
    for form, rank in (("low-rank", None), ("low-rank", 0), ("dense", 4), ("auto", 4)):
        with pytest.raises(ValueError, match="low-rank needs a rank of 1 or more"):
            save_delta(delta, tmp_path / "x", base_hash="b", form=form, rank=rank)
    assert not (tmp_path / "x").exists()


def test_factors_stay_factors(pair, tmp_path):
    base, tuned = pair
    short, _ = truncated((tuned - base).keep("*.attn.[qo]"), 2)
    saved = StoredDelta(save_delta(short, tmp_path / "v", base_hash="b"))
    assert set(saved.factored()) == set(short)
    for site in short:
        assert saved.errors[site] == 0
        assert all(torch.equal(a, b) for a, b in zip(saved.factors(site), short.factors(site), strict=True))
    twice = StoredDelta(save_delta(saved, tmp_path / "w", base_hash="b"))
    assert (tmp_path / "w" / FILE).read_bytes() == (tmp_path / "v" / FILE).read_bytes()
    assert twice.nonzero == sum(2 * sum(short.shape(s)) for s in short)


def test_read_vector_knows_an_adapter(pair, tmp_path):
    base, tuned = pair
    short, _ = truncated((tuned - base).keep("*.attn.[qo]"), 2)
    assert isinstance(read_vector(save_adapter(short, tmp_path / "adapter", base), base), Adapter)
    assert isinstance(read_vector(save_delta(short, tmp_path / "delta", base_hash="b"), base), StoredDelta)
    with pytest.raises(CheckpointError, match=r"holds no delta\.safetensors: it is a model\. Take the difference"):
        read_vector(base.folder, base)


def test_files_of_the_first_format_are_read(tmp_path):
    value = torch.randn(4, 6)
    tensors = {
        "0.mlp.up.value": value,
        "norm.index": torch.tensor([1, 5], dtype=torch.int32),
        "norm.value": torch.tensor([2.0, 3.0]),
    }
    shapes = {"0.mlp.up": [4, 6], "norm": [8]}
    save_file(
        tensors, tmp_path / FILE, {"format": "model-surgery delta 1", "base_hash": "abc", "shapes": json.dumps(shapes)}
    )
    saved = StoredDelta(tmp_path)
    assert saved.base_hash == ""  # it was known by another hash
    assert torch.equal(saved["0.mlp.up"], value)
    assert saved["norm"].tolist() == [0, 2, 0, 0, 0, 3, 0, 0]
    assert saved.rows("norm", slice(5, 7)).tolist() == [3, 0]


def test_what_is_read_is_the_callers_own(pair, tmp_path):
    base, tuned = pair
    saved = StoredDelta(save_delta(tuned - base, tmp_path / "v", base_hash="b", form="dense"))
    before = saved["0.mlp.up"].clone()
    saved["0.mlp.up"].zero_()
    assert torch.equal(saved["0.mlp.up"], before)


GOOD = {"format": "model-surgery delta 3", "base_hash": "b", "shapes": '{"0.mlp.up": [4, 6]}', "errors": "{}"}
ONES = {"0.mlp.up.value": torch.ones(4, 6)}


def sparse(*positions, dtype=torch.int32):
    return {"0.mlp.up.index": torch.tensor(positions, dtype=dtype), "0.mlp.up.value": torch.ones(len(positions))}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (ONES, {"format": "model-surgery delta 4"}, "its format is 'model-surgery delta 4'"),
        (ONES, {"base_hash": None}, "damaged delta: 'base_hash'"),
        (ONES, {"shapes": None}, "damaged delta: 'shapes'"),
        (ONES, {"shapes": "{"}, "damaged delta"),
        (ONES, {"shapes": "[]"}, "damaged delta"),
        (ONES, {"shapes": "[" * 100_000}, "damaged delta"),
        (ONES, {"shapes": '{"0.mlp.up": [4, -6]}'}, r"\[4, -6\] is not the shape of a tensor"),
        (ONES, {"shapes": '{"0.mlp.up": [4, 6.0]}'}, r"\[4, 6\.0\] is not the shape of a tensor"),
        (ONES, {"shapes": '{"0.mlp.up": 24}'}, "24 is not the shape of a tensor"),
        (ONES, {"shapes": '{"0.mlp.up": [6, 4]}'}, r"0\.mlp\.up\.value is torch\.float32 of \(4, 6\), for \(6, 4\)"),
        (ONES, {"shapes": '{"0.mlp": [4, 6]}'}, "damaged delta"),
        (ONES, {"shapes": '{"*.mlp.up": [4, 6]}'}, "is not a site"),
        (ONES, {"shapes": '{"0.mlp.up": [4, 6], "norm": [4]}'}, "norm has no tensor"),
        (ONES, {"errors": '{"0.mlp.up": "much"}'}, "damaged delta"),
        ({"0.mlp.up.values": torch.ones(4, 6)}, {}, "0.mlp.up has values"),
        ({"0.mlp.up.value": torch.ones(4, 6).half()}, {}, "is torch.float16"),
        ({"0.mlp.up.left": torch.ones(4, 2)}, {}, "0.mlp.up has left"),
        ({"0.mlp.up.left": torch.ones(4, 2), "0.mlp.up.right": torch.ones(3, 6)}, {}, r"right is torch\.float32 of \(3, 6\)"),
        ({"0.mlp.up.left": torch.ones(4), "0.mlp.up.right": torch.ones(1, 6)}, {}, r"left is torch\.float32 of \(4,\)"),
        (sparse(1, 2), {"shapes": '{"0.mlp.up": [1000000, 1000000]}'}, "larger than any tensor of a model"),
        (sparse(1, 2), {"shapes": '{"0.mlp.up": [1, 1000000000]}'}, "larger than any tensor of a model"),
        (sparse(1, 2, dtype=torch.uint8), {}, "index is torch.uint8"),
        ({**sparse(1, 2), "0.mlp.up.value": torch.ones(3)}, {}, r"index is torch\.int32 of \(2,\)"),
        (sparse(*range(25)), {}, r"value is torch\.float32 of \(25,\)"),
        (sparse(2, 1), {}, "positions at 0.mlp.up are out of order or range"),
        (sparse(1, 1), {}, "positions at 0.mlp.up are out of order or range"),
        (sparse(3, 24), {}, "positions at 0.mlp.up are out of order or range"),
        (sparse(-1, 3), {}, "positions at 0.mlp.up are out of order or range"),
    ],
)  # fmt: skip
def test_damaged_deltas(tensors, metadata, said, tmp_path):
    save_file(tensors, tmp_path / FILE, {k: v for k, v in {**GOOD, **metadata}.items() if v is not None})
    with pytest.raises(CheckpointError, match=said) as error:
        StoredDelta(tmp_path)["0.mlp.up"]
    assert "\n" not in str(error.value)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    """Writing a vector of many tensors costs the memory of one."""
    code = """
import resource, sys, torch
from surgery.delta import save_delta
from surgery.sites import Site
from surgery.weights import Delta

class Many(Delta):
    def __init__(self, count):
        self.count = count
    def shapes(self):
        return {Site(i, "mlp.up"): torch.Size((1000, 1000)) for i in range(self.count)}
    def _read(self, site, rows):
        return torch.full((1000, 1000), 1.0 + site.layer)[rows]

save_delta(Many(2), sys.argv[1] + "/two", base_hash="b")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_delta(Many(40), sys.argv[1] + "/forty", base_hash="b")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True).stdout
    )
    assert (tmp_path / "forty" / FILE).stat().st_size > 150e6
    assert grown < 20  # MB; all together are 160


def test_an_interrupt_while_reading_is_an_interrupt(pair, tmp_path):
    base, tuned = pair
    save_delta(tuned - base, tmp_path / "v", base_hash="b")
    code = """
import sys
from surgery.delta import StoredDelta
delta = StoredDelta(sys.argv[1])
print("reading", flush=True)
while True:
    for site in delta:
        delta[site]
"""
    for wait in (0.05, 0.1):
        words = [sys.executable, "-c", code, tmp_path / "v"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "reading\n"
                time.sleep(wait)
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=30)
                assert said.strip().endswith("KeyboardInterrupt"), said
            finally:
                process.kill()


def test_a_disk_that_lies_is_found_out(pair, tmp_path, monkeypatch):
    base, tuned = pair
    sync = os.fsync

    def flip(descriptor):
        sync(descriptor)
        (path,) = tmp_path.glob(f".v.partial-*/{FILE}")
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(CheckpointError, match=r"in .* differs from what was written"):
        save_delta(tuned - base, tmp_path / "v", base_hash="b")
    assert list(tmp_path.iterdir()) == []


def test_the_seal_is_part_of_the_whole(pair, tmp_path):
    base, tuned = pair
    save_delta(
        tuned - base, tmp_path / "v", base_hash="b", seal=lambda folder: (folder / "note").write_text(str(folder))
    )
    assert (tmp_path / "v" / "note").read_text() != str(tmp_path / "v"), "written before the folder had its name"

    def refuse(folder):
        raise ValueError("no room for a record")

    with pytest.raises(ValueError, match="no room for a record"):
        save_delta(tuned - base, tmp_path / "w", base_hash="b", seal=refuse)
    short, _ = truncated((tuned - base).keep("*.attn.[qo]"), 2)
    with pytest.raises(ValueError, match="no room for a record"):
        save_adapter(short, tmp_path / "x", base, seal=refuse)
    assert [p.name for p in tmp_path.iterdir()] == ["v"]

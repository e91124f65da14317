"""A vector survives its file."""

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint, CheckpointError
from surgery.delta import FILE, StoredDelta, save_delta
from surgery.edits import Scale
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


def test_what_cannot_be_saved(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    with pytest.raises(ValueError, match="The two models are identical: there is no change to save"):
        save_delta(base - Checkpoint(tmp_path / "base"), tmp_path / "d", base_hash="x")
    with pytest.raises(ValueError, match="The two models are identical"):
        save_delta(base - base, tmp_path / "d", base_hash="x")
    with pytest.raises(ValueError, match=r"The change at 1\.mlp\.up is NaN or infinite; nothing was written"):
        save_delta(apply(Scale(float("nan")), base, "1.mlp.up") - base, tmp_path / "d", base_hash="x")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_folders_that_hold_no_delta(tmp_path):
    with pytest.raises(CheckpointError, match=r"none holds no delta\.safetensors \(no such folder\)\. `surgery diff"):
        StoredDelta(tmp_path / "none")
    save_file({"x": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="not a delta: its format is None"):
        StoredDelta(tmp_path)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        StoredDelta(tmp_path)

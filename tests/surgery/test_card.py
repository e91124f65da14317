"""The card: front matter that hubs read, what was asked and kept, and never where on this machine anything lies."""

import re
from pathlib import Path

import torch
import yaml

from surgery import Checkpoint, Record, Scale, apply, write
from surgery.card import model_card
from surgery.merging import merge
from tests.families import save_tiny
from tests.siblings import of


def test_a_card(tmp_path):
    source = save_tiny("llama", tmp_path / "secret" / "model")
    (source / "README.md").write_text("---\nlicense: mit\nlicense_name: mine\ntags: [x]\n---\n# Model\n")
    vector = str(tmp_path / "secret" / "vector")
    typed = ["surgery", "apply", str(source), "--add", f"{vector}:0.7", "owner/name", "--to", str(tmp_path / "out")]
    record = Record(
        "apply",
        {},
        typed,
        inputs={"model": {"ref": str(source), "hash": "a" * 64}, vector: {"ref": vector, "hash": "b" * 64}},
    )
    cards = []
    written = write(
        apply(Scale(0.5), Checkpoint(source), "0.mlp.up"),
        tmp_path / "out",
        seal=lambda folder, found: cards.append(model_card(record, found, source)),
    )
    (card,) = cards
    assert str(tmp_path) not in card
    assert "secret" not in card
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert front == {
        "base_model": ["model"],
        "library_name": "transformers",
        "license": "mit",
        "license_name": "mine",
        "tags": ["model-surgery", "apply"],
    }
    assert "`surgery apply model --add vector:0.7 owner/name --to out`" in card
    assert "1 tensor changed" in card
    assert all(f"- {check}" in card for check in written.checks)
    assert Path(written.folder).name in card


def test_what_became_of_a_model_in_which_no_site_is_listed(homes, tmp_path, gpu):
    home = homes("llama")

    def card_of(write_it):
        cards = []
        write_it(lambda _, found: cards.append(model_card(Record("merge", {}), found, home / "base")))
        return cards[0]

    base = Checkpoint(home / "base")
    slices = [{"sources": [{"model": str(home / "a"), "layer_range": [0, n]}]} for n in (2, 3)]
    stack = {"merge_method": "passthrough", "slices": slices}
    executed = of(home, "model_stock")
    assert "\nAn exact copy, nothing changed.\n" in card_of(lambda seal: write(base, tmp_path / "copy", seal=seal))
    half = card_of(lambda seal: write(base, tmp_path / "half", dtype=torch.bfloat16, seal=seal))
    assert "\nNo site changed, stored in another dtype.\n" in half
    assert " tensors merged by our stream.\n" in card_of(lambda seal: merge(stack, tmp_path / "stack", seal=seal))
    assert " tensors merged by mergekit's executor.\n" in card_of(
        lambda s: merge(executed, tmp_path / "made", multi_gpu=True, seal=s)
    )


def test_no_path_in_a_word_of_an_option(tmp_path):
    vector = f"{tmp_path / 'secret' / 'vector'}:0.7"
    record = Record("apply", {}, ["surgery", "apply", f"--add={vector}", "--scale=0.5", "--add=owner/name"])
    written = write(Checkpoint(save_tiny("llama", tmp_path / "model")), tmp_path / "out")
    card = model_card(record, written, tmp_path / "model")
    assert "`surgery apply --add=vector:0.7 --scale=0.5 --add=owner/name`" in card

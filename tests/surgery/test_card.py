"""The card: front matter that hubs read, what was asked and kept, and never where on this machine anything lies."""

import re
from pathlib import Path

import yaml

from surgery import Checkpoint, Record, Scale, apply, write
from surgery.card import model_card
from tests.families import save_tiny


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
    assert "1 tensors changed" in card
    assert all(f"- {check}" in card for check in written.checks)
    assert Path(written.folder).name in card

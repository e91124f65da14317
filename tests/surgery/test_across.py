"""A language model's vector on the language tower of a vision-language model: nothing mapped by hand, everything said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.across import land
from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, save_delta
from surgery.edits import Scale
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import Delta, apply
from surgery.writing import write
from tests.families import VLM_FAMILIES, save_tiny, save_tiny_vlm, tiny_language

TWO_LAYOUTS = [f for f in VLM_FAMILIES if f not in ("idefics3", "smolvlm")]
LAYOUTS = [(f, "new") for f in VLM_FAMILIES] + [(f, "old") for f in TWO_LAYOUTS]
EMBED, HEAD = Site(None, "embed"), Site(None, "head")
IDS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))


def save_language(family, folder, **options):
    """With values that bf16 holds, so that differences of two such models are exact in fp32, or nearly."""
    model, tokenizer = tiny_language(family, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """(family, tied text, tied host, layout) -> base and tuned language model, and a vision-language model whose tower is the base."""
    made = {}

    def case(family, layout="new", tied=True, host_tied=None):
        host_tied = tied if host_tied is None else host_tied
        key = family, layout, tied, host_tied
        if key not in made:
            folder = tmp_path_factory.mktemp("case")
            base = save_language(family, folder / "base", tied=tied)
            tuned = save_language(family, folder / "tuned", tied=tied, seed=1)
            host = save_tiny_vlm(family, folder / "host", layout, seed=2, tied=host_tied, language=base)
            made[key] = Checkpoint(folder / "base"), Checkpoint(folder / "tuned"), Checkpoint(host), tuned
        return made[key]

    return case


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def host_logits(folder):
    from transformers import AutoModelForImageTextToText

    return logits(AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval())


def raw(checkpoint):
    return {name: checkpoint.stored(name).clone() for name in checkpoint.tensors}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_a_task_vector_lands_on_the_tower(cases, family, layout, tied, tmp_path):
    base, tuned, host, module = cases(family, layout, tied)
    landed = land(tuned - base, host)
    assert landed.unmatched == []
    assert set(landed.delta) == set(base)
    words = "rows 0 to 99 of 104; the model's other 4 stay"
    assert landed.restricted == {s: f"{s}: {words}" for s in ([EMBED] if tied else [EMBED, HEAD])}
    assert landed.notes == []
    written = write(host + landed.delta, tmp_path / "moved")
    expected = logits(module)
    found = host_logits(tmp_path / "moved")[..., :100]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # vision and projector, byte by byte; the file's own names and order of tensors
    moved = Checkpoint(tmp_path / "moved")
    assert list(moved.tensors) == list(host.tensors)
    assert all(torch.equal(moved[s][: len(tuned[s])], tuned[s]) for s in tuned)
    assert not any(torch.equal(moved[s], host[s]) for s in landed.delta)
    beside = [p.name for s, p in host.anatomy.places.items() if s.is_unnamed]
    assert beside
    assert all(torch.equal(moved.stored(n), host.stored(n)) for n in beside)
    assert torch.equal(moved[EMBED][100:], host[EMBED][100:])
    assert (tmp_path / "moved" / "preprocessor_config.json").read_bytes() == (
        host.folder / "preprocessor_config.json"
    ).read_bytes()
    count = len(host.tensors)  # none of them merely read back
    assert f"{count} tensors bit-equal to those computed ({count} as loaded by transformers)" in written.checks


@pytest.mark.parametrize("family", TWO_LAYOUTS)
def test_old_and_new_layouts_give_the_same_model(cases, family, tmp_path):
    points = []
    for layout in ("old", "new"):
        base, tuned, host, _ = cases(family, layout)
        points.append(host + 0.7 * land(tuned - base, host).delta)
    old, new = points
    assert list(old) == list(new)
    assert all(torch.equal(old[s], new[s]) for s in old)
    assert not any((new - old)[s].any() for s in new)  # a vector between layouts: vision has the same sites too
    if family == "llava":
        for point, name in ((old, "old"), (new, "new")):
            write(point, tmp_path / name)
        assert torch.equal(host_logits(tmp_path / "old"), host_logits(tmp_path / "new"))


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_vision_language_models_own_vector(cases, family, tmp_path):
    """Measured on one layout, landed on the other and on the language model, which lacks the vision tower."""
    base, _, old, _ = cases(family, "old")
    _, _, new, _ = cases(family, "new")
    scaled = apply(Scale(2.0), old, "**")
    beside = next(s for s in old if s.is_unnamed)
    both = apply(Scale(3.0), scaled, str(beside))
    vector = both - old
    across = land(vector, new)
    assert (across.unmatched, across.restricted, across.notes) == ([], {}, [])
    assert across.delta is vector  # it fits as it is: nothing is wrapped, and sums stay exact
    assert all(torch.equal((new + vector)[s], both[s].float()) for s in new)
    down = land(vector, base)
    assert down.unmatched == sorted(s for s in old if s.is_unnamed)
    assert down.restricted == {EMBED: "embed: rows 0 to 99 of 104; the vector's other 4 are left out"}
    assert torch.equal(down.delta["embed"], vector["embed"][:100])
    assert down.in_words()[0] == f"{down.unmatched[0]}: not in this model, left out"
    assert len(down.in_words()) == len(down.unmatched) + 1


def test_rows_of_a_landed_vector(cases):
    base, tuned, host, _ = cases("llava", tied=False)
    landed = land(tuned - base, host).delta
    for site in (EMBED, HEAD, Site(1, "mlp.up")):
        whole = landed[site]
        assert whole.shape == landed.shape(site) == host.shape(site)
        assert whole.dtype == torch.float32
        for rows in (slice(0, 7), slice(95, 102), slice(101, 104), slice(40, 40), slice(98, 300)):
            assert torch.equal(landed.rows(site, rows), whole[rows])
    assert torch.equal(landed["embed"][:100], (tuned - base)["embed"])
    assert not landed["embed"][100:].any()


def test_a_stored_vector_lands_as_it_did(cases, tmp_path):
    base, tuned, host, _ = cases("qwen2-vl")
    save_delta(tuned - base, tmp_path / "vector", base_hash=base.hash())
    stored = StoredDelta(tmp_path / "vector")
    assert stored.origins() == (tuned - base).origins()
    one, other = land(stored, host), land(tuned - base, host)
    assert one.restricted == other.restricted
    assert all(torch.equal(one.delta[s], other.delta[s]) for s in other.delta)
    again = land(0.5 * one.delta.keep("*.mlp.*"), host)
    assert again.in_words() == []
    torch.testing.assert_close(again.delta["1.mlp.up"], 0.5 * stored["1.mlp.up"])


class Given(Delta):
    """A vector whose tensors are given."""

    def __init__(self, tensors):
        self._tensors = {Site.parse(s): t for s, t in tensors.items()}

    def shapes(self):
        return {s: t.shape for s, t in self._tensors.items()}

    def _read(self, site, rows):
        return self._tensors[site][rows]


def test_a_tied_models_vector_moves_both_where_they_are_two(cases, tmp_path):
    base, tuned, host, module = cases("llava", "new", tied=True, host_tied=False)
    landed = land(tuned - base, host)
    assert torch.equal(landed.delta["head"], landed.delta["embed"])
    assert landed.notes == ["head: moves as embed does, to which the vector's own models tie it"]
    assert set(landed.restricted) == {EMBED, HEAD}
    write(host + landed.delta, tmp_path / "moved")
    torch.testing.assert_close(host_logits(tmp_path / "moved")[..., :100], logits(module), rtol=1e-5, atol=1e-5)
    # the tie is known of a stored vector, of a part and of a multiple as well
    save_delta(tuned - base, tmp_path / "vector", base_hash="x")
    for same in (StoredDelta(tmp_path / "vector"), (tuned - base).keep("embed"), 0.5 * (tuned - base)):
        assert HEAD in land(same, host).delta
    # where it is not known, names decide, and that is said
    unknown = land(Given({"embed": torch.ones(104, 32)}), host)
    assert HEAD not in unknown.delta
    assert unknown.notes == ["embed: moves alone; whether the vector's own models tie the head to it is not known"]


def test_an_untied_models_vector_on_a_tied_model(cases):
    base, tuned, host, _ = cases("llava", "new", tied=False, host_tied=True)
    vector = tuned - base
    with pytest.raises(
        ValueError,
        match=r"host ties head to embed, one matrix for both, but the vector moves embed and head differently\.",
    ):
        land(vector, host)
    with pytest.raises(ValueError, match=r"moves embed alone\. Leave both out"):
        land(vector.keep(["embed", "*.mlp.up"]), host)
    with pytest.raises(ValueError, match=r"moves head alone"):
        land(vector.keep(["head", "*.mlp.up"]), host)
    inner = land(vector.keep(["*.attn.**", "*.mlp.**"]), host)  # as the message says
    assert inner.in_words() == []
    assert len(inner.delta) > 20
    # neither moves: a difference of models tuned in their layers only
    layers = apply(Scale(2.0), base, "*.mlp.up") - base
    landed = land(layers, host)
    assert landed.unmatched == []
    assert landed.notes == []
    assert not landed.delta["embed"].any()
    # both move alike
    change = torch.randn(100, 32)
    alike = land(Given({"embed": change, "head": change}), host)
    assert alike.notes == ["embed: one matrix with the head here; the vector moves both alike"]
    assert torch.equal(alike.delta["embed"][:100], change)
    with pytest.raises(ValueError, match="embed and head differently"):
        land(Given({"embed": change, "head": -change}), host)


def test_a_sum_over_a_tie_is_ambiguous(cases):
    tied, tied_tuned, host, _ = cases("llava", "new", tied=True, host_tied=False)
    untied, untied_tuned, *_ = cases("llava", "new", tied=False)
    mixed = (tied_tuned - tied) + (untied_tuned - untied)
    with pytest.raises(
        ValueError, match=r"a sum of vectors from models that tie .* Land each part by itself, then add"
    ):
        land(mixed, host)
    apart = land(tied_tuned - tied, host).delta + land(untied_tuned - untied, host).delta
    assert torch.equal(apart["head"][:100], (tied_tuned - tied)["embed"] + (untied_tuned - untied)["head"])
    assert land(mixed.keep("*.mlp.up"), host).in_words() == []


def test_layers_and_widths_must_agree(cases, tmp_path):
    base, tuned, host, _ = cases("llava")
    _, _, other, _ = cases("qwen2-vl")
    with pytest.raises(
        ValueError,
        match=r"does not fit .*host: 12 sites differ, first 0\.attn\.k: \(24, 32\) against \(16, 32\); 0\.attn\.o: .*; 0\.attn\.q: "
        r".*Layers and widths must be the same; only the rows of embed and head",
    ):
        land(tuned - base, other)
    deeper = Given({f"{layer}.mlp.up": torch.zeros(40, 32) for layer in range(5)})
    with pytest.raises(ValueError, match=r"2 sites differ, first 3\.mlp\.up: \(40, 32\) against absent; 4\.mlp\.up"):
        land(deeper, host)
    from transformers import AutoModelForCausalLM

    module, _ = tiny_language("llava")
    module.config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(module.config).save_pretrained(tmp_path / "two")
    shallow = Checkpoint(tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"measured on a model of 2 layers, and .*host has 3: layers do not correspond"
    ):
        land(apply(Scale(2.0), shallow, "0.mlp.up") - shallow, host)
    with pytest.raises(
        ValueError, match=r"measured on a model of 3 layers, and .*two has 2.*It moves 2\.attn\.k, 2\.attn"
    ):
        land(tuned - base, shallow)
    with pytest.raises(ValueError, match=r"no site in common: the vector moves 0\.attn\.q\.bias"):
        land(Given({"0.attn.q.bias": torch.zeros(48)}), host)
    with pytest.raises(ValueError, match=r"1 site differs, first embed: \(100, 16\) against \(104, 32\)"):
        land(Given({"embed": torch.zeros(100, 16)}), host)


def test_a_heads_bias_has_a_row_for_each_token_too(tmp_path):
    host = save_tiny("llama", tmp_path / "host", tied=False)
    tensors = load_file(host / "model.safetensors")
    save_file(tensors | {"lm_head.bias": torch.zeros(100)}, host / "model.safetensors")
    landed = land(Given({"head.bias": torch.arange(104.0)}), Checkpoint(host))
    assert list(landed.restricted) == [Site(None, "head.bias")]
    assert torch.equal(landed.delta["head.bias"], torch.arange(100.0))


def test_sites_the_target_lacks(cases):
    _, _, host, _ = cases("llava")
    biased = Given({"0.attn.q.bias": torch.ones(48), "1.attn.k.bias": torch.ones(24), "1.mlp.up": torch.ones(40, 32)})
    landed = land(biased, host)
    assert landed.unmatched == [Site(0, "attn.q.bias"), Site(1, "attn.k.bias")]
    assert list(landed.delta) == [Site(1, "mlp.up")]
    assert landed.in_words() == [f"{s}: not in this model, left out" for s in ("0.attn.q.bias", "1.attn.k.bias")]
    assert (host + landed.delta).changed_from(host) == {Site(1, "mlp.up")}


def retokenize(folder: Path, swap: tuple[str, str] | None):
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    if swap:
        vocabulary = said["model"]["vocab"]
        vocabulary[swap[0]], vocabulary[swap[1]] = vocabulary[swap[1]], vocabulary[swap[0]]
    path.write_text(json.dumps(said))


def test_rows_that_stand_for_other_tokens(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    tuned = Checkpoint(save_tiny("llama", tmp_path / "tuned", seed=1))
    host = Checkpoint(save_tiny_vlm("llava", tmp_path / "host"))
    assert land(tuned - base, host).notes == []
    retokenize(host.folder, ("a", "b"))
    note = (
        "tokens: 2 of the 100 common rows of embed and head stand for other tokens, first row 70: 'a' where the vector was measured, "
        "'b' here"
    )
    assert land(tuned - base, host).notes == [note]
    assert land((tuned - base).keep("*.mlp.*"), host).notes == []  # no row of a token moves
    said = json.loads((host.folder / "tokenizer.json").read_text())
    ids = said["model"]["vocab"]
    pieces = {"type": "Unigram", "vocab": [[token, 0.0] for token in sorted(ids, key=ids.__getitem__)]}
    (host.folder / "tokenizer.json").write_text(json.dumps({"model": pieces, "added_tokens": said["added_tokens"]}))
    assert land(tuned - base, host).notes == [note]  # row by row, as a unigram model's are written
    save_delta(tuned - base, tmp_path / "vector", base_hash="x")
    stored = StoredDelta(tmp_path / "vector")
    assert land(stored, host).notes == []  # not known
    assert land(stored, host, base=base.folder).notes == [note]
    longer = Given({"embed": torch.zeros(110, 32)})  # of which the model has 104
    assert land(longer, host, base=base.folder).notes[-1] == note.replace("100", "104")
    said["added_tokens"] += [{"id": 80, "content": "<new>"}]
    (host.folder / "tokenizer.json").write_text(json.dumps({"model": pieces, "added_tokens": said["added_tokens"]}))
    assert land(tuned - base, host).notes == [note.replace("2 of", "3 of")]
    (host.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        land(tuned - base, host)
    (host.folder / "tokenizer.json").unlink()
    assert land(tuned - base, host).notes == []


def test_nothing_is_read_before_it_is_asked(cases):
    code = """
import sys
from surgery.across import land
from surgery.checkpoint import Checkpoint
read = []
base, tuned, host = map(Checkpoint, sys.argv[1:])
for point in (base, tuned, host):
    point._read = lambda site, rows, real=point._read: read.append(str(site)) or real(site, rows)
landed = land(tuned - base, host)
moved = host + 0.7 * landed.delta
len(moved), list(landed.delta), moved.shape("embed"), landed.in_words()
assert read == [], read
moved["1.mlp.up"]
assert set(read) == {"1.mlp.up"}, read
"""
    folders = [str(c.folder) for c in cases("llava")[:3]]  # apart: checking types at run time reads tensors
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


def test_installed_in_a_live_vision_language_model(cases):
    base, tuned, host, module = cases("gemma3", "old")
    live = Model.load(host.folder)
    before = logits(live.module)
    with live.installed(live.weights + land(tuned - base, live.weights).delta):
        torch.testing.assert_close(logits(live.module)[..., :100], logits(module), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(live.module), before)

"""Every fault that can be planted is found before a weight is read, and what to do about it is said."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from surgery import Adapter, land, merge, read_recipe
from surgery.adapter_config import read_adapter_config
from surgery.adapter_names import without_wrappers
from surgery.checkpoint import Checkpoint, CheckpointError
from surgery.delta import StoredDelta, save_delta
from surgery.merging import RecipeError
from surgery.preflight import Report, check_apply, check_model, check_recipe
from surgery.preflight.facts import moved_by_delta
from surgery.preflight.forecast import UNDO_LIMIT, peak_memory
from surgery.preflight.recipe import TABLED, asked, installed, lint, methods
from tests.families import FAMILIES, save_tiny, tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned and third: tiny llamas in bf16, base in three shards; delta: tuned - base."""
    home = tmp_path_factory.mktemp("store")
    save_tiny("llama", home / "base", dtype=torch.bfloat16, shards=3)
    save_tiny("llama", home / "tuned", dtype=torch.bfloat16, seed=1)
    save_tiny("llama", home / "third", dtype=torch.bfloat16, seed=2)
    save_tiny("llama", home / "untied", dtype=torch.bfloat16, tied=False)
    save_tiny("gpt2", home / "gpt2", dtype=torch.bfloat16)
    base, tuned = Checkpoint(home / "base"), Checkpoint(home / "tuned")
    save_delta(tuned - base, home / "delta", base_hash=base.hash())
    return home


@pytest.fixture
def home(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store to break things in; the working directory."""
    shutil.copytree(store, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    return tmp_path / "x"


def recipe(home: Path, **changes: object) -> Path:
    """A sound linear merge of base and tuned, with changes; None removes a key."""
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "tuned")]
    said: dict[str, object] = {"merge_method": "linear", "models": models, "dtype": "bfloat16"} | changes
    path = home / "recipe.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in said.items() if v is not None}, sort_keys=False))
    return path


def based(home: Path, method: str, each: dict | None = None, **changes: object) -> Path:
    """The same with a base: tuned and third against base."""
    models = [{"model": name, "parameters": each or {}} for name in ("tuned", "third")]
    return recipe(home, merge_method=method, base_model="base", models=models, **changes)


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def rewrite(folder: Path, change) -> None:
    """Replace a single-file model's tensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def found(report: Report, severity: str, kind: str, *words: str) -> None:
    """That the report has such a problem, with these words in what it says; and that its text shows it."""
    hits = [p for p in report.problems if (p.severity, p.kind) == (severity, kind)]
    assert hits, str(report)
    said = [f"{p.where} {p.found} -> {p.fix}" for p in hits]
    assert any(all(w in line for w in words) for line in said), "\n".join(said)
    assert hits[0].found in str(report)
    assert hits[0].fix in str(report)
    assert report.ok == (not any(p.severity == "error" for p in report.problems))


# --- nothing wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_has_no_problems(family: str, tied: bool, tmp_path: Path) -> None:
    report = check_model(str(save_tiny(family, tmp_path / "m", tied=tied, shards=2)))
    assert report.problems == ()
    assert report.ok
    assert report.forecast is None
    assert str(report) == f"{tmp_path / 'm'}: no problems found"


def test_sound_jobs_have_no_problems_and_a_forecast(home: Path) -> None:
    assert check_recipe(based(home, "model_stock")).problems == ()
    for make in (recipe, lambda h: based(h, "task_arithmetic", {"weight": 0.5})):
        report = check_recipe(make(home), home / "out")
        assert report.problems == (), str(report)
        assert report.forecast is not None
        assert report.forecast.disk > Checkpoint(home / "base").nbytes
        assert "forecast" in str(report)
    for settings in (
        {"weight": [0.2, 0.8], "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.3}]},
        {"weight": "5e-1", "density": 0.5},
    ):
        assert check_recipe(based(home, "ties", settings)).problems == ()
    report = check_apply("base", ["delta"], home / "out")
    assert report.problems == (), str(report)
    assert report.forecast is not None
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("base", [0, 2]), ("tuned", [1, 3]))]
    stacked = check_recipe(recipe(home, merge_method="passthrough", models=None, slices=slices), home / "out")
    assert stacked.problems == (), str(stacked)
    assert stacked.forecast is not None
    assert stacked.forecast.disk == pytest.approx(4 / 3 * report.forecast.disk, rel=0.05)
    for words in ({"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}):
        lined_up = check_recipe(based(home, "model_stock", **words), home / "out")
        assert lined_up.problems == (), str(lined_up)
        assert lined_up.forecast is not None
        assert lined_up.forecast.memory is not None


def test_what_is_checked_is_named_by_text_or_path(home: Path) -> None:
    assert check_model(home / "base") == check_model(str(home / "base"))
    assert check_apply(home / "base", [home / "delta"]).problems == check_apply("base", ["delta"]).problems
    for wrong in (None, 3, [home], b"base"):
        for check in (
            check_model,
            lambda ref: check_apply(ref, []),
            lambda ref: check_apply("base", [ref]),
        ):
            with pytest.raises(ValueError, match=rf"{re.escape(reprlib.repr(wrong))}: give .* as text or a path\."):
                check(wrong)
    for wrong in ("delta", None):
        with pytest.raises(
            ValueError, match=rf"adds={wrong!r}: give a list of folders or hub ids, as in adds=\['vectors/lift'\]\."
        ):
            check_apply("base", wrong)


def test_a_recipe_is_checked_however_merge_takes_it(home: Path) -> None:
    for path in (recipe(home), recipe(home, merge_method="liner"), based(home, "model_stock", tokenizer_source="base")):
        asked = yaml.safe_load(path.read_text())
        asked["models"] = tuple({**model, "model": Path(model["model"])} for model in asked["models"])
        of_file = check_recipe(path)
        ways = [str(path), path.read_text(), asked] + ([read_recipe(path)] if of_file.ok else [])
        for way in ways:
            report = check_recipe(way)
            assert [(p.kind, p.found, p.fix) for p in report.problems] == [
                (p.kind, p.found, p.fix) for p in of_file.problems
            ]
            assert (report.forecast is None) == (of_file.forecast is None)
            assert report.subject == (str(path) if way == str(path) else "The recipe")
    for wrong in (None, 3, [home], b"base", " "):
        with pytest.raises(RecipeError, match=rf"a mapping, and this is {re.escape(reprlib.repr(wrong))}\."):
            check_recipe(wrong)


def test_the_table_of_methods_is_the_installed_mergekits() -> None:
    if installed() == TABLED:
        assert methods() == asked()
    assert len(methods()) == 20


# --- the recipe ---------------------------------------------------------------------------------------------------------------


def test_faults_of_a_recipe(home: Path) -> None:
    def of(path: Path) -> Report:
        return check_recipe(path)

    weight = {"weight": 0.5}
    two = [{"model": "base", "parameters": weight}, {"model": "tuned", "parameters": weight}]
    cases: list[tuple[Path | str, str, str, list[str]]] = []

    def case(text: Path, severity: str, kind: str, *words: str) -> None:
        cases.append((text.read_text(), severity, kind, list(words)))

    case(recipe(home, merge_method="liner"), "error", "method", "'liner'", "Write merge_method: linear")
    case(recipe(home, merge_method="TIES"), "error", "method", "Write merge_method: ties")
    case(recipe(home, merge_method="zzzzzzzzzz"), "error", "method", "Choose arcee_fusion, breadcrumbs")
    case(recipe(home, merge_method=None), "error", "method", "names no merge_method", "Write merge_method:")
    case(
        recipe(home, merge_method="slerp", models=two),
        "error",
        "base",
        "base_model, which slerp needs",
        "Write base_model:",
    )
    case(
        recipe(home, merge_method="slerp", base_model="base", models=two),
        "error",
        "parameter",
        "gives no t",
        "Write t: 0.5",
    )
    case(
        recipe(home, models=[{"model": "base"}, two[1]]),
        "error",
        "parameter",
        "gives no weight for base",
        "Write weight: 1.0",
    )
    misspelt = recipe(home, models=two, tokenizer={"sorce": "base", "tokens": {"!": {"forced": True}}})
    case(misspelt, "warning", "key", "tokenizer has the key 'sorce', which mergekit does not know", "Write source")
    case(misspelt, "warning", "key", "tokenizer.tokens.! has the key 'forced'", "Write force")
    piece = {"sources": [{"model": "base", "layer_range": [0, 3]}], "residual_weight": 0.5}
    stacked = recipe(home, merge_method="passthrough", models=None, slices=[piece])
    case(
        stacked, "warning", "key", "slices[0] has the key 'residual_weight', which mergekit does not know", "Remove it"
    )
    case(based(home, "ties"), "error", "parameter", "gives no weight for third, tuned", "Write weight: 1.0")
    case(
        based(home, "ties", weight),
        "warning",
        "parameter",
        "gives no density",
        "nothing is dropped",
        "Write density: 0.5",
    )
    case(based(home, "ties", {**weight, "densty": 0.5}), "warning", "parameter", "'densty'", "ignores", "Write density")
    case(based(home, "ties", {**weight, "density": 5}), "error", "parameter", "density: 5", "from 0 to 1")
    case(based(home, "ties", {**weight, "density": "half"}), "error", "parameter", "'half'", "Write a number")
    case(
        based(home, "ties", {**weight, "normalize": True, "density": 1}),
        "warning",
        "parameter",
        "normalize",
        "Move normalize",
    )
    case(
        based(home, "ties", {**weight, "density": 1}, parameters={"normalize": "often"}),
        "error",
        "parameter",
        "'often'",
        "true or false",
    )
    case(
        based(home, "task_arithmetic", {"weight": [{"filter": "mlp", "value": 1}]}),
        "error",
        "parameter",
        "only for some tensors",
        "without filter",
    )
    case(recipe(home, base_model="third"), "error", "parameter", "base_model third is one of them", "drop base_model")
    case(
        recipe(home, models=[{"model": m, "parameters": {"weight": w}} for m, w in (("base", 1), ("tuned", -1))]),
        "error",
        "parameter",
        "sum to 0",
        "normalize: false",
    )
    case(
        recipe(home, merge_method="slerp", base_model="base", models=[*two, {"model": "third"}], parameters={"t": 0.5}),
        "error",
        "models",
        "has 3 models; slerp takes exactly 2",
    )
    case(
        recipe(home, merge_method="slerp", base_model="base", models=two, parameters={"t": 2}),
        "warning",
        "parameter",
        "t: 2",
        "from 0 (the base) to 1",
    )
    case(recipe(home, merge_method="model_stock", base_model="base", models=two), "error", "models", "takes at least 3")
    case(recipe(home, merge_method="passthrough", models=two), "error", "models", "Write slices: one model each")
    case(recipe(home, models=[two[0], two[0]]), "error", "models", "names base twice", "add up its weights")
    case(recipe(home, models=None), "error", "recipe", "none of models, slices and modules", "Keep exactly one")
    case(recipe(home, models="base"), "error", "recipe", "not a list", "begin with -")
    case(recipe(home, slices=[{"sources": two}]), "error", "recipe", "has models and slices", "Keep exactly one")
    case(recipe(home, dtpye="bfloat16"), "warning", "key", "'dtpye'", "Write dtype")
    case(recipe(home, dtype="bf16"), "error", "dtype", "'bf16'", "Write dtype: bfloat16")
    case(recipe(home, out_dtype="int8"), "error", "dtype", "'int8'")
    case(
        recipe(home, tokenizer_source="base"),
        "warning",
        "tokenizer",
        "no base_model",
        "first model's",
        "Write base_model:",
    )
    for own, words in (
        ({"seed": -1}, ("surgery.seed is -1", "from 0 to 4294967295")),
        ({"seed": True}, ("surgery.seed is True", "whole number")),
        ({"compute": "bf16"}, ("surgery.compute is 'bf16'", "compute: float32 or compute: mergekit")),
        ({"sed": 1}, ("surgery has the key 'sed'", "Write seed")),
        ([1], ("surgery is [1], not a mapping", "surgery: {seed: 3}")),
    ):
        case(recipe(home, surgery=own), "error", "recipe", *words)
        with pytest.raises(RecipeError):
            read_recipe(cases[-1][0])
    case(
        recipe(home, merge_method="passthrough", models=None, slices=[{"sources": []}]),
        "error",
        "recipe",
        "slices[0] has no sources",
    )
    case(
        recipe(home, tokenizer_source="union", tokenizer={"source": "union"}), "error", "tokenizer", "both", "Keep one"
    )
    case(recipe(home, chat_template="chatlm"), "error", "template", "'chatlm'", "Write chat_template: chatml")
    case(
        recipe(home, models=[two[0], {"model": "tunde", "parameters": weight}]),
        "error",
        "reference",
        "tunde is not here",
        "Did you mean tuned?",
    )
    case(
        recipe(home, models=[two[0], {"model": "who/never", "parameters": weight}]),
        "error",
        "reference",
        "who/never is neither a folder nor in the hub's local cache",
        "hf download who/never",
    )
    case(recipe(home, models=[two[0], {"model": 7, "parameters": weight}]), "error", "reference", "is 7, not a model")
    layered = {"models": None, "merge_method": "passthrough"}
    case(
        recipe(home, **layered, slices=[{"sources": [{"model": "base", "layer_range": [0, 9]}]}]),
        "error",
        "layers",
        "has 0 to 2",
        "layer_range: [0, 3]",
    )
    case(
        recipe(home, **layered, slices=[{"sources": [{"model": "base", "layer_range": [2, 1]}]}]),
        "error",
        "layers",
        "[2, 1]",
        "ONE_PAST_LAST",
    )
    case(recipe(home, **layered, slices=[{"sources": [{"model": "base"}]}]), "error", "layers", "no layer_range")
    uneven = [
        {"model": "base", "layer_range": [0, 2], "parameters": weight},
        {"model": "tuned", "layer_range": [0, 3], "parameters": weight},
    ]
    case(
        recipe(home, models=None, slices=[{"sources": uneven}]),
        "error",
        "layers",
        "ranges of 2 and 3 layers",
        "equally many",
    )
    for i, (text, severity, kind, words) in enumerate(cases):
        path = home / f"recipe{i}.yml"
        path.write_text(text)
        found(of(path), severity, kind, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", ["is not YAML (line 1", "Correct it"]),
        ("merge_method: linear\nmerge_method: ties\n", ["line 2", "'merge_method' is there twice"]),
        ("- a\n- b\n", ["is ['a', 'b'], not a mapping", "Write at least merge_method"]),
        ("", ["is empty"]),
        ("a: &a [*a]\n", ["is not YAML"]),
        ("a: !!python/object/apply:os.system ['true']\n", ["is not YAML"]),
        ("[" * 3000, ["is not YAML"]),
    ],
)
def test_what_is_no_recipe(home: Path, text: str, words: list[str]) -> None:
    (home / "r.yml").write_text(text)
    found(check_recipe(home / "r.yml"), "error", "recipe", *words)


def test_aliases_that_multiply_are_not_followed(home: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)
    ]
    (home / "r.yml").write_text("\n".join(lines))
    found(check_recipe(home / "r.yml"), "error", "recipe", "aliases stand for more than")


# --- models beside each other -------------------------------------------------------------------------------------------------


def beside(home: Path, change, **recipe_changes: object) -> Report:
    change(home / "tuned")
    return check_recipe(recipe(home, **recipe_changes))


def test_faults_between_models(home: Path) -> None:
    def restore() -> None:
        shutil.rmtree(home / "tuned")
        save_tiny("llama", home / "tuned", dtype=torch.bfloat16, seed=1)

    def other(family: str = "llama", **options: object):
        def change(folder: Path) -> None:
            shutil.rmtree(folder)
            save_tiny(family, folder, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]

        return change

    def fewer_layers(folder: Path) -> None:
        configure(folder, num_hidden_layers=2, layer_types=...)
        rewrite(folder, lambda t: {n: x for n, x in t.items() if ".layers.2." not in n})

    def longer(folder: Path) -> None:
        configure(folder, vocab_size=108)
        name = "model.embed_tokens.weight"
        rewrite(folder, lambda t: t | {name: torch.cat([t[name], t[name][:8]])})

    def wider(folder: Path) -> None:
        configure(folder, hidden_size=64)
        rewrite(
            folder,
            lambda t: {n: torch.cat([x, x], -1) if x.shape[-1] == 32 and x.ndim == 1 else x for n, x in t.items()},
        )

    def tokens(folder: Path) -> None:
        path = folder / "tokenizer.json"
        said = json.loads(path.read_text())
        vocabulary = said["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(said))

    def another_token(folder: Path) -> None:
        path = folder / "tokenizer.json"
        said = json.loads(path.read_text())
        said["model"]["vocab"]["<new>"] = said["model"]["vocab"].pop("q")
        path.write_text(json.dumps(said))

    def more_tokens(folder: Path) -> None:
        path = folder / "tokenizer.json"
        said = json.loads(path.read_text())
        del said["model"]["vocab"]["z"]
        path.write_text(json.dumps(said))

    def template(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("assistant", "model"))

    def as_float(folder: Path) -> None:
        configure(folder, dtype="float32")
        rewrite(folder, lambda t: {n: x.float() for n, x in t.items()})

    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    yarn = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}
    cases = [
        (other("gpt2"), "error", "architecture", ["is a gpt2, and base is a llama", "one architecture"]),
        (fewer_layers, "error", "layers", ["has 2 layers, and base 3", "layer_range"]),
        (wider, "error", "width", ["64 wide, and base 32", "same size"]),
        (lambda f: configure(f, num_attention_heads=6, head_dim=8), "error", "heads", ["has 6 attention heads, and base 4", "same heads"]),
        (longer, "error", "vocabulary", ["has 108 rows", "base 100", "tokenizer_source: base"]),
        (lambda f: configure(f, rope_parameters=rope), "error", "rope", ["theta 500000, and base with 10000", "tuned from one base"]),
        (lambda f: configure(f, rope_parameters=..., rope_theta=1e6), "error", "rope", ["theta 1e+06"]),
        (lambda f: configure(f, rope_parameters=yarn), "warning", "rope", ["yarn", "base_model"]),
        (lambda f: configure(f, rope_parameters=...), "note", "rope", ["does not say its rope_theta", "same number"]),
        (lambda f: configure(f, hidden_act="gelu"), "error", "config", ["hidden_act gelu", "compute alike"]),
        (lambda f: configure(f, rms_norm_eps=1e-5), "warning", "config", ["rms_norm_eps", "make sure"]),
        (template, "warning", "template", ["another chat template than base", "chat_template:"]),
        (lambda f: (f / "chat_template.jinja").unlink(), "note", "template", ["base has one, tuned none"]),
        (tokens, "error", "tokenizer", ["numbers its tokens otherwise", "2 differ", "tokenizer_source: base"]),
        (another_token, "error", "tokenizer", ["numbers its tokens otherwise", "1 differ", "'<new>' there and 'q' here"]),
        (more_tokens, "warning", "tokenizer", ["lacks 1 of its tokens", "same ids"]),
        (other(tied=False), "error", "tie", ["has a head of its own, and base ties", "Untie base first"]),
        (as_float, "warning", "dtype", ["stored in float32, and base in bfloat16", "--dtype"]),
    ]  # fmt: skip
    for change, severity, kind, words in cases:
        restore()
        found(beside(home, change), severity, kind, *words)
    restore()
    pair = [{"model": m, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for m in ("base", "tuned")]
    report = beside(home, lambda f: configure(f, num_key_value_heads=1), models=None, slices=[{"sources": pair}])
    found(report, "error", "heads", "has 1 key/value heads")  # of ranges of layers as well
    restore()
    for change in (longer, tokens):  # a tokenizer source lines rows up by token
        report = beside(home, change, tokenizer_source="union")
        assert not [
            p for p in report.problems if p.severity != "note" and p.kind in ("vocabulary", "tokenizer", "shapes")
        ], str(report)
        restore()


# --- one folder ---------------------------------------------------------------------------------------------------------------


def test_faults_of_a_folder(store: Path, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return Path(shutil.copytree(store / name, tmp_path / "m"))

    shard = "model-00002-of-00003.safetensors"

    def stray(folder: Path) -> None:
        said = json.loads((folder / INDEX).read_text())
        said["weight_map"]["model.extra.weight"] = shard
        (folder / INDEX).write_text(json.dumps(said))

    def outside(folder: Path) -> None:
        said = json.loads((folder / INDEX).read_text())
        said["weight_map"]["model.norm.weight"] = "../x.safetensors"
        (folder / INDEX).write_text(json.dumps(said))

    def cut(folder: Path) -> None:
        os.truncate(folder / shard, (folder / shard).stat().st_size - 1)

    def linked(folder: Path) -> None:
        shutil.copy(folder / shard, tmp_path / "elsewhere")
        (folder / shard).unlink()
        (folder / shard).symlink_to(tmp_path / "elsewhere")

    def pickles(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"never opened")

    def without_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()

    def drop(name: str):
        return lambda folder: rewrite(folder, lambda t: {n: x for n, x in t.items() if name not in n})

    cases = [
        ("base", lambda f: (f / shard).unlink(), "error", "shards", ["lacks 1 of 3 shards", shard, "Download it again"]),
        ("base", cut, "error", "file", [shard, "truncated", "Download it again"]),
        ("base", stray, "error", "index", ["promises model.extra.weight", "Download it again"]),
        ("base", outside, "error", "index", ["../x.safetensors", "inside the folder"]),
        ("base", lambda f: shutil.copy(f / shard, f / "model-4.safetensors"), "error", "index", ["model-4.safetensors", "Remove the stray files"]),
        ("base", lambda f: (f / INDEX).unlink(), "error", "file", ["has 3 safetensors files", "Download it again"]),
        ("base", linked, "error", "link", [shard, "is a link out of the folder", "Put the file itself there"]),
        ("tuned", pickles, "error", "pickle", ["holds pickles (pytorch_model.bin)", "Convert once"]),
        ("tuned", lambda f: (f / "config.json").unlink(), "error", "config", ["has no config.json", "Give a folder"]),
        ("tuned", lambda f: (f / "config.json").write_text("{"), "error", "config", ["is not JSON", "Download it again"]),
        ("tuned", lambda f: configure(f, model_type="bloom"), "error", "family", ["'bloom'", "anatomies.toml"]),
        ("tuned", drop("layers.1.mlp.up"), "error", "missing", ["lacks 1 of its tensors", "layers.1.mlp.up_proj", "download"]),
        ("tuned", lambda f: configure(f, num_hidden_layers=2), "error", "layers", ["says 2 layers, but the tensors have 3", "Set num_hidden_layers to 3"]),
        ("tuned", lambda f: configure(f, vocab_size=99), "error", "vocabulary", ["vocab_size 99", "has 100 rows", "Set vocab_size to 100"]),
        ("tuned", lambda f: configure(f, num_key_value_heads=4), "error", "heads", ["says 4 heads of 12", "24 rows", "config.json that belongs"]),
        ("tuned", lambda f: configure(f, tie_word_embeddings=False), "error", "missing", ["lm_head.weight"]),
        ("untied", lambda f: configure(f, tie_word_embeddings=True), "error", "tie", ["hold lm_head.weight", "embed_tokens.weight", "Set tie_word_embeddings to false"]),
        ("tuned", lambda f: configure(f, quantization_config={"quant_method": "gptq"}), "error", "quantised", ["gptq", "Use the original"]),
        ("tuned", lambda f: rewrite(f, lambda t: t | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}), "error", "quantised", ["qweight", "dequantize"]),
        ("tuned", lambda f: rewrite(f, lambda t: {n: x.to(torch.float8_e4m3fn) if x.ndim == 2 else x for n, x in t.items()}), "error", "quantised", ["codes, not weights"]),
        ("tuned", lambda f: rewrite(f, lambda t: {n: x.float() if "norm" in n else x for n, x in t.items()}), "note", "dtype", ["mixes", "bfloat16", "float32"]),
        ("tuned", lambda f: configure(f, dtype="float16"), "warning", "dtype", ["says float16, but the tensors are bfloat16", "Set dtype to bfloat16"]),
        ("tuned", without_tokenizer, "warning", "tokenizer", ["has no tokenizer files", "Copy tokenizer.json"]),
        ("tuned", lambda f: (f / "tokenizer.json").write_text("[1]"), "error", "tokenizer", ["holds no vocabulary"]),
        ("tuned", lambda f: configure(f, vocab_size=50) or rewrite(f, lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:50].clone()}), "error", "tokenizer", ["ids up to 99", "50 rows", "resize"]),
    ]  # fmt: skip
    for name, change, severity, kind, words in cases:
        folder = fresh(name)
        change(folder)
        found(check_model(str(folder)), severity, kind, *words)


def test_links_of_the_hubs_cache_are_followed(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate((store / "base").iterdir()):
        shutil.copy(path, repository / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert check_model("some/name").problems == ()
    assert Checkpoint(snapshot).nbytes == Checkpoint(store / "base").nbytes


# --- apply --------------------------------------------------------------------------------------------------------------------


def test_faults_of_apply(home: Path) -> None:
    save_tiny("llama", home / "copy", dtype=torch.bfloat16, seed=5)
    (home / "copy" / "record.json").write_text(json.dumps({"results": {"hash": "f" * 64}}))
    (home / "empty").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "r": 2}
    pairs = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(48, 2),
    }

    def lora(name: str, tensors: dict[str, torch.Tensor], **changes: object) -> str:
        (home / name).mkdir()
        (home / name / "adapter_config.json").write_text(json.dumps(adapter | changes))
        save_file(tensors, home / name / "adapter_model.safetensors")
        return name

    assert check_apply("base", [lora("fine", pairs, base_model_name_or_path="base")]).problems == ()
    narrow = {n: t if "lora_B" in n else torch.zeros(2, 64) for n, t in pairs.items()}
    strange = {n.replace("q_proj", "c_proj"): t for n, t in pairs.items()}
    lora("pickled", pairs)
    (home / "pickled" / "adapter_model.safetensors").rename(home / "pickled" / "adapter_model.bin")
    torn = shutil.copytree(home / "delta", home / "torn")
    os.truncate(torn / "delta.safetensors", 500)
    cases: list[tuple[str, str, str, str, list[str]]] = [
        ("gpt2", "delta", "error", "delta", ["does not fit gpt2", "sites differ", "its own base's architecture"]),
        ("copy", "delta", "warning", "delta", ["hash ffffffffffff", "make sure"]),
        ("base", "nothing", "error", "reference", ["nothing is not here"]),
        ("base", "empty", "error", "delta", ["neither a delta nor an adapter", "there is: nothing"]),
        ("base", "tuned", "error", "delta", ["surgery diff tuned BASE"]),
        ("base", "torn", "error", "delta", ["delta.safetensors", "not a complete safetensors file"]),
        ("base", lora("lora", pairs), "warning", "adapter", ["was trained on someone/else", "Make sure"]),
        ("base", lora("narrow", narrow), "error", "adapter", ["does not fit the base's shapes", "someone/else"]),
        ("base", lora("strange", strange), "error", "adapter", ["changes modules the base lacks", "c_proj"]),
        ("base", lora("unsaid", pairs, peft_type=None), "error", "adapter", ["does not say that it is a LoRA"]),
        (
            "base",
            lora("ia3", pairs, peft_type="IA3"),
            "error",
            "adapter",
            ["is an adapter of type 'IA3'", "merge_and_unload"],
        ),
        ("base", "pickled", "error", "adapter", ["pickle", "save_pretrained(NEW_FOLDER)"]),
        ("lora", "delta", "error", "adapter", ["is an adapter, not a model", "BASE+lora"]),
    ]
    for model, add, severity, kind, words in cases:
        found(check_apply(model, [add]), severity, kind, *words)
    for name in ("unsaid", "ia3", "pickled"):  # in one place, and so in one set of words
        with pytest.raises(CheckpointError) as refusal:
            read_adapter_config(Path(name))
        (problem,) = check_apply("base", [name]).problems
        assert str(refusal.value).endswith(f"{problem.found}. {problem.fix}.")
    found(
        check_apply("base", ["delta"], to=home / "tuned"), "error", "output", "exists already", "Choose another folder"
    )
    found(
        check_apply("base", ["delta"], to=home / "recipe.yml" / "x" if recipe(home) else ""),
        "error",
        "output",
        "cannot be made",
    )
    found(check_apply("base", ["delta"], dtype="int8"), "error", "dtype", "'int8'", "bfloat16")
    # what lands in part
    shutil.copytree(home / "base", home / "longer")
    configure(home / "longer", vocab_size=108)
    path = (
        home / "longer" / json.loads((home / "longer" / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]
    )
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(2, 1)[:108].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    found(check_apply("longer", ["delta"]), "warning", "vocabulary", "(100, 32) against (108, 32)", "same tokens")
    assert check_apply("longer", ["delta"]).ok
    save_tiny("qwen2", home / "qwen2", dtype=torch.bfloat16)
    save_tiny("qwen2", home / "qwen2b", dtype=torch.bfloat16, seed=1)
    biased = Checkpoint(home / "qwen2b") - Checkpoint(home / "qwen2")
    save_delta(biased, home / "biased", base_hash="0" * 64)
    found(
        check_apply("base", ["biased"]),
        "warning",
        "delta",
        "moves 9 sites that base lacks, first 0.attn.k.bias",
        "left out",
    )
    # the record of a delta names its base
    (home / "delta" / "record.json").write_text(
        json.dumps({"inputs": {"base": {"ref": "somewhere/base-1", "hash": "0"}}})
    )
    found(check_apply("base", ["delta"]), "warning", "delta", "was measured from somewhere/base-1", "is a copy of it")
    (home / "delta" / "record.json").write_text(
        json.dumps({"inputs": {"base": {"ref": str(home / "base"), "hash": "0"}}})
    )
    assert check_apply("base", ["delta"]).problems == ()
    # adapters in recipes
    models = [
        {"model": "base+fine", "parameters": {"weight": 1}},
        {"model": "tuned+narrow", "parameters": {"weight": 1}},
    ]
    found(check_recipe(recipe(home, models=models)), "error", "adapter", "does not fit the base's shapes (tuned)")


def test_a_disk_too_small(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    found(check_apply("base", ["delta"], home / "out"), "error", "disk", "has 0 MB free", "Make room")


# --- headers only -------------------------------------------------------------------------------------------------------------


def test_no_byte_of_a_weight_is_read(home: Path) -> None:
    """The data behind every header is a hole: had it been read, 40 GB of zeros would have gone by."""
    for name in ("base", "tuned"):
        for path in (home / name).glob("*.safetensors"):
            raw = path.read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8:start])
            at, rows = 0, 10**9
            for entry in header.values():
                if "shape" in entry:
                    if len(entry["shape"]) == 1 and entry["shape"][0] != 32:
                        entry["shape"] = [rows]
                    size = 2
                    for n in entry["shape"]:
                        size *= n
                    entry["data_offsets"] = [at, at + size]
                    at += size
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text)
            os.truncate(path, 8 + len(text) + at)
    code = f"""
import builtins, mmap, os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
mapped = []
mmap.mmap = lambda *a, **k: mapped.append(a)
from surgery.preflight import check_recipe, check_apply
report = check_recipe({str(recipe(home))!r})
assert report.problems == (), str(report)
assert check_apply("base", ["delta"]).ok
assert not mapped
heavy = [m for m in ("torch", "transformers", "mergekit", "numpy", "safetensors", "peft") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home, timeout=60)


def test_only_so_much_is_read(store: Path, tmp_path: Path) -> None:
    """By the kernel's own count: the headers of a 400 MB file, not the file."""
    folder = Path(shutil.copytree(store / "tuned", tmp_path / "m"))
    rewrite(folder, lambda t: t | {"model.big.weight": torch.zeros(200_000_000, dtype=torch.bfloat16)})
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from surgery.preflight import check_model
def taken():
    return int(next(l for l in open("/proc/self/io") if l.startswith("rchar")).split()[1])
before = taken()
check_model({str(folder)!r})
print(taken() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 3_000_000


# --- the forecast -------------------------------------------------------------------------------------------------------------


def test_the_forecast_of_memory_follows_the_writer() -> None:
    job = {
        "entries": 10**8,
        "width": 2,
        "largest": 10**7,
        "fused": 0,
        "vocabulary": 10**4,
        "models": 2,
        "method": "linear",
    }

    def peak(**changes: object) -> float:
        return peak_memory(**(job | changes))  # type: ignore[arg-type]

    assert peak(entries=10**11, largest=10**9, models=9) == peak()  # in chunks, whatever the models' size
    assert peak(method=None) < peak() < peak(method="dare_ties") < peak(method="dare_ties", models=3)
    assert peak(method="dare_ties", largest=10**8) > 5 * peak(method="dare_ties", largest=10**6)
    assert peak(fused=10**8) > peak()
    small, edge = 10**4, UNDO_LIMIT // 6  # a way back that is kept is put together; one over its limit is let go
    kept = [peak(entries=entries, method=None) for entries in (0, small, edge)]
    assert kept == sorted(set(kept))
    assert peak(entries=2 * edge, method=None) < kept[-1]


def test_what_a_vector_moves_is_counted(home: Path) -> None:
    few = check_apply("base", ["delta"]).forecast
    vector = (Checkpoint(home / "tuned") - Checkpoint(home / "base")).keep("0.mlp.up")
    save_delta(vector, home / "little", base_hash="0")
    less = check_apply("base", ["little"]).forecast
    wide = check_apply("base", ["delta"], dtype="float32").forecast
    assert few is not None
    assert less is not None
    assert wide is not None
    assert less.memory < few.memory
    assert less.disk < few.disk  # the way back is smaller
    assert wide.disk > less.disk
    assert wide.memory < few.memory  # in another dtype there is none
    assert moved_by_delta(home / "little" / "delta.safetensors") == 32 * 40


def test_a_report_is_json(home: Path) -> None:
    report = check_recipe(recipe(home, merge_method="liner"))
    again = json.loads(json.dumps(report.as_dict()))
    assert again["ok"] is False
    assert again["problems"][0].keys() == {"severity", "kind", "where", "found", "fix"}


def test_problems_come_gravest_first_and_once(home: Path) -> None:
    configure(home / "tuned", rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    (home / "tuned" / "chat_template.jinja").unlink()
    report = check_recipe(recipe(home, dtpye="x"))
    order = [("error", "warning", "note").index(p.severity) for p in report.problems]
    assert order == sorted(order)
    assert len(set(report.problems)) == len(report.problems)
    assert str(report).splitlines()[-1].endswith("1 error, 1 warning, 1 note")


def test_lint_alone_looks_at_no_model(home: Path) -> None:
    plan, problems = lint(recipe(home, models=[{"model": "far/away", "parameters": {"weight": 1.0}}]))
    assert plan is not None
    assert problems == []
    assert [s.model for s in plan.sources] == ["far/away"]


def test_weights_may_sum_to_0_where_nothing_divides_by_the_sum(home: Path) -> None:
    """A difference of models; `normalize` is looked for as mergekit does, in the slice first."""
    pair = [{"model": m, "parameters": {"weight": w}} for m, w in (("base", 1), ("tuned", -1))]
    for off in (False, 0, "false"):
        assert lint(recipe(home, models=pair, parameters={"normalize": off}))[1] == []
    piece = {"sources": [{**one, "layer_range": [0, 3]} for one in pair]}
    off = {**piece, "parameters": {"normalize": False}}
    assert lint(recipe(home, models=None, slices=[off]))[1] == []
    (problem,) = lint(recipe(home, models=None, slices=[off, piece]))[1]
    assert problem.where.endswith("slices[1]")


def test_experts_packed_in_the_files_of_one_model_alone(home: Path) -> None:
    module, _ = tiny("mixtral")
    for name, original in (("apart", True), ("packed", False), ("tight", False)):
        module.save_pretrained(str(home / name), save_original_format=original)

    def report(*names: str) -> Report:
        return check_recipe(recipe(home, models=[{"model": m, "parameters": {"weight": 0.5}} for m in names]))

    assert report("packed", "tight").ok
    found(report("apart", "packed"), "error", "plan", "packed has no tensor model.layers.0")


def test_a_group_of_modules_is_completed_by_the_base(home: Path) -> None:
    """As mergekit does it: the base need not be listed, and whole models are no ranges of layers."""
    group = {"models": [{"model": "tuned", "parameters": {"weight": 0.5}}]}
    path = recipe(home, merge_method="task_arithmetic", base_model="base", models=None, modules={"default": group})
    plan, problems = lint(path)
    assert [p for p in problems if p.severity == "error"] == []
    assert plan is not None
    assert not plan.layered
    assert [source.text for source in plan.slices[0]] == ["tuned", "base"]


def test_every_slice_may_name_its_own_base(home: Path) -> None:
    """As mergekit reads it: the recipe needs none then, and the base is one of the slice's own sources."""
    ends = [(0, 1, "base", "tuned"), (1, 3, "third", "tuned")]
    slices = [
        {
            "base_model": base,
            "sources": [
                {"model": base, "layer_range": [first, last]},
                {"model": other, "layer_range": [first, last], "parameters": {"weight": 0.5}},
            ],
        }
        for first, last, base, other in ends
    ]
    path = recipe(home, merge_method="task_arithmetic", models=None, slices=slices)
    report = check_recipe(path)
    assert [p for p in report.problems if p.severity == "error"] == [], str(report)
    merge(path, home / "merged")
    # the base of the first is no base of the second
    slices[1]["base_model"] = "base"
    path = recipe(home, merge_method="task_arithmetic", models=None, slices=slices)
    found(check_recipe(path), "error", "base", "slices[1]", "does not contain the base_model base")
    del slices[1]["base_model"]
    path = recipe(home, merge_method="task_arithmetic", models=None, slices=slices)
    found(check_recipe(path), "error", "base", "has no base_model")


@pytest.mark.parametrize("moved", [("embed",), ("head",), ("embed", "head"), ("0.attn.q",), ("0.attn.q", "embed")])
@pytest.mark.parametrize("onto", ["base", "untied"])
@pytest.mark.parametrize("measured", ["tied", "untied", "both"])
def test_vectors_across_ties_are_judged_as_apply_judges_them(
    measured: str, onto: str, moved: tuple[str, ...], home: Path
) -> None:
    """What the check calls an error `land` refuses, and what it calls none lands, or is warned of."""
    save_tiny("llama", home / "untied2", dtype=torch.bfloat16, tied=False, seed=4)
    tied = Checkpoint(home / "tuned") - Checkpoint(home / "base")
    apart = Checkpoint(home / "untied2") - Checkpoint(home / "untied")
    if measured == "both":
        vector = tied.keep(at=["0.attn.q", "embed"]) + apart.keep(at=["0.attn.q", "head", "embed"])
    else:
        vector = {"tied": tied, "untied": apart}[measured]
    there = [site for site in moved if site in {str(s) for s in vector}]
    if not there:
        return
    save_delta(vector.keep(at=there), home / "vector", base_hash="0" * 64)
    report = check_apply(onto, ["vector"])
    kinds = {p.severity for p in report.problems if p.kind == "tie"}
    stored, on = StoredDelta(home / "vector"), Checkpoint(home / onto)
    if report.ok and "warning" not in kinds:
        land(stored, on)
    else:
        assert kinds <= {"error", "warning"}
        with pytest.raises(ValueError, match="tie"):
            land(stored, on)


def test_an_adapter_of_the_bare_model_fits_what_wraps_it() -> None:
    names = (
        "model.layers.0.mlp.up_proj",
        "language_model.model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",
    )
    assert {without_wrappers(name) for name in names} == {"layers.0.mlp.up_proj"}
    assert without_wrappers("model.vision_tower.layers.0.mlp.up_proj") == "vision_tower.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("family", "tied", "modules"),
    [
        ("gpt2", True, ["c_attn", "lm_head", "wte"]),
        ("gpt-neox", False, ["query_key_value", "embed_out"]),
        ("llama", True, ["q_proj", "lm_head"]),
        ("llama", False, ["down_proj", "lm_head", "embed_tokens"]),
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["as saved", "as the hub has it"])
def test_an_adapter_is_judged_as_apply_judges_it(
    family: str, tied: bool, modules: list[str], bare: bool, tmp_path: Path
) -> None:
    """By the same names: a folder saved from the backbone alone lacks its prefix."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = save_tiny(family, tmp_path / "model", tied=tied)
    module = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(module, LoraConfig(r=2, target_modules=modules)).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    if bare:
        rewrite(folder, lambda tensors: {n.removeprefix(f"{module.base_model_prefix}."): t for n, t in tensors.items()})
    report = check_apply(str(folder), [str(tmp_path / "adapter")])
    assert report.ok, str(report)
    Adapter(tmp_path / "adapter", Checkpoint(folder))


@pytest.mark.parametrize(
    ("said", "tensors", "words"),
    [
        ({"r": 4}, {}, "rank 4"),
        ({"rank_pattern": {"q_proj": 3}}, {}, "rank 3"),
        ({"lora_alpha": "much"}, {}, "alpha"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, {}, "pissa"),
        ({"use_dora": True}, {}, "no magnitude"),
        ({}, {"lora_B": None}, "belong together"),
        ({}, {"lora_A": torch.zeros(2, 48)}, "must be"),
        ({}, {"lora_B.bias": torch.zeros(48)}, "adds a bias"),
    ],
)
def test_an_adapter_that_apply_refuses_is_refused_by_check(
    said: dict[str, object], tensors: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    """Its config and the shapes of its headers say so."""
    base = save_tiny("llama", tmp_path / "base")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pair: dict[str, torch.Tensor | None] = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(48, 2)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    kept = {kind: tensor for kind, tensor in (pair | tensors).items() if tensor is not None}
    names = {k: f"{module}.{k.removesuffix('.bias')}.{'bias' if k.endswith('bias') else 'weight'}" for k in kept}
    save_file({names[kind]: tensor for kind, tensor in kept.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **said}))
    with pytest.raises(CheckpointError, match=words):
        Adapter(folder, Checkpoint(base))
    found(check_apply(str(base), [str(folder)]), "error", "adapter", words)

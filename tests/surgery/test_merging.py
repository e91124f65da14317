"""Merging: what recipes may say, what is made of them by which road, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from surgery import Adapter, undo, write, writing
from surgery.checkpoint import Checkpoint, CheckpointError
from surgery.merging import RECIPE, Merged, RecipeError, merge, plan, read_recipe, rules
from surgery.preflight import check_model, check_recipe
from surgery.proof import VerificationError
from surgery.record import Record
from tests.families import characters, save_tiny
from tests.siblings import (
    DENSE,
    NAMES,
    RANDOM,
    WEIGHTS,
    by_mergekit,
    furthest,
    of,
    sibling,
    siblings,
    tensors_of,
)

RECIPES = Path(__file__).with_name("recipes")


# --- recipes as people write them ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(homes, tmp_path, monkeypatch):
    """The working folder has the models of the recipes under their names: tiny/base, tiny/a, ..."""
    shutil.copytree(homes("llama", torch.bfloat16), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", sorted(p.name for p in RECIPES.glob("*.yml")))
def test_recipes_from_model_cards(file, tiny):
    text = (RECIPES / file).read_text()
    recipe = read_recipe(RECIPES / file)
    assert recipe.text == text
    done = merge(recipe, "out")
    assert (tiny / "out" / RECIPE).read_text() == text
    asked = yaml.safe_load(text)
    assert done.road == "stream"
    assert asked["merge_method"] in done.checks[0]
    config = json.loads((tiny / "out" / "config.json").read_text())
    stored = asked.get("out_dtype") or asked["dtype"]
    assert config.get("dtype", config.get("torch_dtype")) == stored
    assert {str(t.dtype).removeprefix("torch.") for t in tensors_of(tiny / "out").values()} == {stored}
    assert sorted(p.name for p in tiny.iterdir()) == ["out", "tiny"]  # nothing else is left
    if recipe.method not in RANDOM:
        exact = merge(read_recipe(text + "surgery: {compute: mergekit}\n"), "exact")
        apart = furthest(by_mergekit(asked, tiny / "theirs"), tensors_of(exact.folder))
        assert apart == 0


def test_what_a_recipe_says(homes, tmp_path):
    home = homes("llama")
    recipe = of(home, "ties", each=DENSE, parameters={"normalise": True})
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    read = read_recipe(file)
    assert read.method == "ties"
    assert read.base == str(home / "base")
    assert read.models == [str(home / n) for n in ("base", *NAMES)]
    assert read.unused == ("normalise",)  # a slip that mergekit accepts: accepted, and said
    assert "no parameter normalise" in str(plan(read))
    assert (
        read_recipe(file.read_text()).config
        == read_recipe(recipe).config
        == read_recipe(str(file)).config
        == read.config
    )


GOOD = {"merge_method": "linear", "models": [{"model": "x", "parameters": {"weight": 1}}]}
VECTORS = {"merge_method": "ties", "base_model": "x", "models": [{"model": "y", "parameters": {"weight": 1}}]}
BAD = {
    "not YAML": ("merge_method: [linear\nmodels: 3\n", r"is not YAML \(line 2, column 7\)"),
    "a list": ("- merge_method: linear\n- models\n", "is .*'models'.*, not a mapping"),
    "empty": ("\n", r"The recipe is empty\. Write at least merge_method"),
    "no method": ({"models": GOOD["models"]}, r"^The recipe has no merge_method\. Write a name, as in merge_method: linear\.$"),
    "unknown method": (GOOD | {"merge_method": "sslerp"}, r"'sslerp' is unknown\. Did you mean slerp\?.*task_arithmetic"),
    "no models": ({"merge_method": "linear"}, "^The recipe has none of models, slices and modules. Keep exactly one"),
    "both": (GOOD | {"slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}]}]}, "^The recipe has models and slices. Keep exactly one"),
    "no weight": ({"merge_method": "linear", "models": [{"model": "x"}]}, r"linear: model x lacks the parameter 'weight'"),
    "no t": ({"merge_method": "slerp", "base_model": "x", "models": [{"model": "y"}]}, "slerp lacks the parameter 't'"),
    "no base": ({k: v for k, v in VECTORS.items() if k != "base_model"}, "ties needs a base model. Write base_model: the model"),
    "base not in slice": (
        {"merge_method": "slerp", "base_model": "b", "parameters": {"t": 0.5},
         "slices": [{"sources": [{"model": m, "layer_range": [0, 2]} for m in "xy"]}]}, r"slerp needs its base model b in slices\[0\]\. Add it to the sources there",
    ),
    "three for slerp": (
        {"merge_method": "slerp", "base_model": "x", "models": [{"model": m} for m in "yz"], "parameters": {"t": 0.5}},
        r"slerp takes exactly 2 models, and models has 3: y, z, x \(base\)\. Give as many",
    ),
    "twice": (GOOD | {"models": GOOD["models"] * 2}, r"models names x twice\. Name each model once"),
    "layer range": ({"merge_method": "passthrough", "slices": [{"sources": [{"model": "x", "layer_range": [0]}]}]}, r"slices\[0\]\.sources\[0\]\.layer_range is \[0\]\. Write \[FIRST, ONE_PAST_LAST\]"),
    **{
        f"layer range {found}": (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "x", "layer_range": found}]}]},
            rf"slices\[0\]: model x has layer_range {re.escape(str(found))}\. Write \[FIRST, ONE_PAST_LAST\]",
        )
        for found in ([-2, 3], [2, 1], [1, 1])
    },
    **{
        f"a weight of {said}": (
            {"merge_method": "ties", "base_model": "x", "models": [{"model": "y", "parameters": {"weight": weight}}]},
            rf"parameter weight is {said}, and nothing can be weighed by that\. Write a finite number",
        )
        for said, weight in (("nan", float("nan")), ("inf", [0, "1e999"]), ("-inf", [{"filter": "mlp", "value": [1, -float("inf")]}, {"value": 1}]))
    },
    **{
        f"a density of {density}": (
            VECTORS | {"parameters": {"density": density}}, rf"parameter density is {said}, which is a fraction\. Write a number from 0 to 1",
        )
        for density, said in ((-0.5, "-0.5"), (2, "2"), ([0.1, 1.5], "1.5"), ({"filter": "mlp", "value": -1}, "-1"))
    },
    "a fraction to select": (
        {"merge_method": "sce", "base_model": "x", "models": [{"model": "y"}], "parameters": {"select_topk": 10}},
        "parameter select_topk is 10, which is a fraction",
    ),
    "a gamma": (VECTORS | {"merge_method": "breadcrumbs", "parameters": {"gamma": -0.1}}, "parameter gamma is -0.1, which is a fraction"),
    "a word for a weight": (
        GOOD | {"parameters": {"weight": "half"}}, r"parameter weight is 'half', which is no number\. Write a number, as in weight: 0\.5",
    ),
    "no weights along the layers": (GOOD | {"parameters": {"weight": []}}, "parameter weight is an empty list.*Write a number"),
    "a word for a flag": (GOOD | {"parameters": {"normalize": "maybe"}}, r"parameter normalize is 'maybe'\. Write true or false"),
    "a number for a model": (GOOD | {"models": [{"model": 3}]}, r"The recipe: models\[0\]\.model is 3\. Write a folder or a hub id"),
    "a word for models": (GOOD | {"models": "x"}, r"models is 'x'\. Write models: and then lines like - model: FOLDER"),
    **{f"not a recipe: {given!r}": (given, "A recipe is the path of a YAML file, YAML text or a mapping, and this is") for given in (None, 3, [1], ("a",), b"x", True)},
    "blank": (" ", "A recipe is the path of a YAML file, YAML text or a mapping, and this is ' '"),
    "a tensor": (GOOD | {"parameters": {"weight": torch.tensor(0.5)}}, r"parameters\.weight is tensor\(0\.5.*Write text, a number, a list or a mapping"),
    "dtype": (GOOD | {"dtype": "int4"}, "dtype 'int4' is not one of float32, bfloat16, float16, float64"),
    "two revisions": (GOOD | {"base_model": "a@b@c"}, r"a@b@c\)\. Write FOLDER, or OWNER/NAME@REVISION of the hub"),
    "two adapters": (GOOD | {"base_model": "a+b+c"}, r"a\+b\+c\)\. Write FOLDER, or OWNER/NAME@REVISION of the hub, with \+ADAPTER"),
    "one beside the base": ({"merge_method": "nuslerp", "base_model": "x", **{k: VECTORS[k] for k in ("models",)}}, r"takes exactly 2 models beside the base, and models has 1: y, x \(base\)"),
    "a model without a name": (GOOD | {"models": [{"parameters": {"weight": 1}}]}, r"models\[0\] has no model\. Write a folder"),
    "a model as a word": (GOOD | {"models": ["x"]}, r"models\[0\] is 'x'\. Write models: and then lines like - model: FOLDER"),
    "an empty weight": (GOOD | {"parameters": {"weight": None}}, r"parameters\.weight is empty\. Write a number"),
    "a filter without a value": (GOOD | {"parameters": {"weight": [{"filter": "mlp"}]}}, r"parameters\.weight\[0\] has no value\. Write a number"),
    "parameters in a list": (GOOD | {"parameters": [1]}, r"parameters is \[1\]\. Write NAME: VALUE lines"),
    "half a layer": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "x", "layer_range": [0, 1.5]}]}]}, r"layer_range\[1\] is 1\.5\. Write \[FIRST",
    ),
    "no sources": ({"merge_method": "passthrough", "slices": [{"model": "x"}]}, r"slices\[0\] has no sources\. Write sources: \["),
    "an empty module": ({"merge_method": "linear", "modules": {"a": {}}}, r"modules\.a has none of models and slices\. Keep exactly one"),
    "two tokenizers": (GOOD | {"tokenizer_source": "base", "tokenizer": {"source": "base"}}, r"has both tokenizer_source and tokenizer\. Keep one"),
    "a word for a tokenizer": (GOOD | {"tokenizer": "union"}, r"tokenizer is 'union'\. Write a mapping, as in tokenizer: {source: base}"),
    "a number for a dtype": (GOOD | {"dtype": 16}, r"dtype is 16\. Write one of float32, bfloat16"),
    "our key": (GOOD | {"surgery": {"sed": 1}}, "has no 'sed'; it has seed and compute"),
    "our seed": (GOOD | {"surgery": {"seed": -1}}, "a seed is a whole number from 0"),
    "our compute": (GOOD | {"surgery": {"compute": "bf16"}}, "float32 or mergekit, not 'bf16'"),
    "our list": (GOOD | {"surgery": [1]}, "is a mapping"),
    "aliases that multiply": ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join(f'*{p}' for _ in range(10))}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "its aliases stand for more than 100,000 values",
    ),
    "a circle": ("models: &m [*m]\nmerge_method: linear\n", "is not YAML .*recursive"),
    "a key twice": ("merge_method: linear\nmodels: []\nmerge_method: slerp\n", "line 3: the key 'merge_method' is there twice"),
    "deep": ("models: " + "[" * 5000 + "]" * 5000 + "\n", "is not YAML"),
    "long": ("x: " + "y" * (1 << 20) + "\n", "has 1048580 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes(case):
    recipe, said = BAD[case]
    with pytest.raises(RecipeError, match=said) as error:
        read_recipe(recipe)
    assert "\n" not in str(error.value)
    assert not re.search("Input should|Field required|[Mm]erge (method|inputs)|instance of", str(error.value))


def test_one_folder_under_two_spellings_is_one_model(tiny):
    """It would count twice: a model beside itself is refused as it is under one name, and a base beside itself is the base."""
    Path("linked").symlink_to("tiny/a")
    each = {"weight": 1}
    for other in ("tiny/a/", "./tiny/a", "tiny/../tiny/a", "linked"):
        models = [{"model": m, "parameters": each} for m in ("tiny/a", other, "tiny/b")]
        twice = {"merge_method": "linear", "models": models}
        said = rf"models names tiny/a twice \(tiny/a and {re.escape(other)} are one\)"
        with pytest.raises(RecipeError, match=said):
            read_recipe(twice)
        (problem,) = check_recipe(twice).problems
        assert re.search(said, f"{problem.where.removeprefix('The recipe, ')} {problem.found}")
    pair = [{"model": m} for m in ("tiny/a", "tiny/b")]
    between = {"merge_method": "slerp", "base_model": "linked", "models": pair, "parameters": {"t": 0.3}}
    assert read_recipe(between).models == ["linked", "tiny/b"]
    assert check_recipe(between).ok
    assert merge(between, "out").hash == merge(between | {"base_model": "tiny/a"}, "once").hash


def test_a_recipe_in_python_may_hold_paths_and_numbers_of_numpy(homes, tmp_path):
    home = homes("llama")
    asked = of(home, "linear", ("a", "b"), base=False, parameters={"weight": 0.5})
    given = of(
        home, "linear", ("a", "b"), base=False, parameters={"weight": np.float32(0.5), "normalize": np.bool_(True)}
    )
    given["models"] = tuple({"model": home / name} for name in ("a", "b"))
    assert read_recipe(given).config == read_recipe(asked | {"parameters": {"weight": 0.5, "normalize": True}}).config
    assert str(plan(given)) == str(plan(read_recipe(asked)))


def test_what_a_recipe_repeats_may_be_written_over():
    text = """
merge_method: ties
base_model: x
models:
  - model: y
    parameters: &shared {weight: 0.5, density: 0.4}
  - model: z
    parameters: {<<: *shared, density: 0.7}
"""
    found = [model.parameters for model in read_recipe(text).config.models or ()]
    assert found == [{"weight": 0.5, "density": 0.4}, {"weight": 0.5, "density": 0.7}]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_base_under_two_spellings(method, tiny):
    """One folder with and without ./ before it: the base differs from itself in nothing, by whatever road its rule is computed."""
    settings = {"parameters": {"weight": 0.5, "density": 0.4}}
    once = {"merge_method": method, "base_model": "tiny/base", "models": [{"model": "tiny/a", **settings}]}
    twice = once | {"base_model": "./tiny/base", "models": [{"model": "tiny/base", **settings}, *once["models"]]}
    if method == "ties":  # normalised: the shares of those that move an entry
        once, twice = ({**recipe, "parameters": {"normalize": False}} for recipe in (once, twice))
    assert merge(once, "once").hash == merge(twice, "twice").hash
    nothing = merge(twice | {"models": twice["models"][:1]}, "nothing")
    assert nothing.hash == nothing.base_hash
    if method == "task_arithmetic":  # a sum in which the base is not even looked at twice
        made = plan(read_recipe(twice | {"models": twice["models"][:1]}))
        layout = Checkpoint(made.layout)
        assert not Merged(made, layout).changed_from(layout)


@pytest.fixture
def hub(homes, tmp_path, monkeypatch):
    """A hub's cache, and no hub: who/tiny-base and who/tiny-a, each with a revision called tuned that is c."""
    from huggingface_hub import constants

    home = homes("llama")
    for name in ("base", "a"):
        repository = tmp_path / "hub" / f"models--who--tiny-{name}"
        (repository / "refs").mkdir(parents=True)
        for ref, commit, model in (("main", "0" * 40, name), ("tuned", "1" * 40, "c")):
            shutil.copytree(home / model, repository / "snapshots" / commit)
            (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def test_models_of_the_hub(hub, tmp_path):
    """By name, and by name and revision; said as written, and seeded as written."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "who/tiny-base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("who/tiny-a", "who/tiny-a@tuned")],
    }
    done = merge(recipe, tmp_path / "out")
    assert list(done.sources) == ["who/tiny-base", "who/tiny-a", "who/tiny-a@tuned"]
    same = merge(of(hub, "task_arithmetic", ("a", "c"), parameters={"weight": 0.5}), tmp_path / "same")
    assert done.hash == same.hash
    both = recipe | {"base_model": "who/tiny-base@main", "models": [{"model": "who/tiny-base"}, recipe["models"][0]]}
    both["parameters"] = {"weight": 0.5}  # one folder under two names is one model, the base
    alone = merge(of(hub, "task_arithmetic", ("a",), parameters={"weight": 0.5}), tmp_path / "alone")
    assert merge(both, tmp_path / "both").hash == alone.hash
    assert plan(read_recipe(both)).sources.keys() == {"who/tiny-base@main", "who/tiny-a"}
    (snapshot,) = (tmp_path / "hub" / "models--who--tiny-a" / "snapshots").glob("0*")
    twice = recipe | {"models": [*recipe["models"], {"model": str(snapshot), "parameters": {"weight": 0.5}}]}
    with pytest.raises(RecipeError, match=rf"names who/tiny-a twice \(who/tiny-a and {snapshot} are one\)"):
        plan(twice)
    found = [f"{problem.where} {problem.found}" for problem in check_recipe(twice).problems]
    assert f"The recipe, models names who/tiny-a twice (who/tiny-a and {snapshot} are one)" in found
    for name, said in (
        ("who/none", "who/none.*neither a folder here nor a model that the hub"),
        ("who/tiny-a@gone", "who/tiny-a@gone.*neither a folder here nor a model that the hub"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            merge(recipe | {"models": [{"model": name, "parameters": {"weight": 1}}]}, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.yml does not exist\. A recipe is a YAML file"):
        read_recipe(tmp_path / "recipe.yml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_recipe(str(tmp_path))
    (tmp_path / "x.yml").write_bytes(b"merge_method: \xff\xfe")
    with pytest.raises(RecipeError, match="is not text"):
        read_recipe(tmp_path / "x.yml")


def test_models_that_do_not_fit(homes, tmp_path, unchecked):
    """Said before anything is computed, and nothing is left."""
    home, other = homes("llama"), homes("qwen2")
    mixed = of(home, "linear", ("a",), base=False, parameters={"weight": 1})
    mixed["models"].append({"model": str(other / "a")})
    wide = shutil.copytree(home / "a", tmp_path / "wide")
    tensors = load_file(wide / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], torch.ones(3, 32)])
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wide / "config.json").read_text()) | {"vocab_size": 103}
    (wide / "config.json").write_text(json.dumps(config))
    quantised = load_file(home / "a" / "model.safetensors")
    quantised["model.layers.1.mlp.up_proj.weight"] = quantised["model.layers.1.mlp.up_proj.weight"].to(
        torch.float8_e4m3fn
    )
    save_file(
        quantised, shutil.copytree(home / "a", tmp_path / "codes") / "model.safetensors", metadata={"format": "pt"}
    )
    wider = of(home, "linear", ("a",), base=False, parameters={"weight": 1})
    wider["models"].append({"model": str(wide)})
    codes = of(home, "linear", ("a",), base=False, parameters={"weight": 1})
    codes["models"].append({"model": str(tmp_path / "codes")})
    missing = of(home, "linear", ("a", "nowhere"), base=False, parameters={"weight": 1})
    partly = of(home, "linear", base=False, each={n: {"weight": {"filter": "mlp", "value": 1}} for n in NAMES})
    nothing = of(home, "linear", base=False, each={n: {"weight": w} for n, w in zip(NAMES, (1, -2, 1), strict=True)})
    for recipe, error, said in (
        (mixed, RecipeError, "mergekit cannot plan this recipe.*mix different architectures"),
        (
            wider,
            RecipeError,
            r"embed_tokens\.weight has different shapes: .*\(100, 32\), .*\(103, 32\)\. Their vocabularies differ",
        ),
        (
            codes,
            RecipeError,
            r"model .*codes: 1\.mlp\.up is stored as torch\.float8_e4m3fn: .* codes of a quantised model",
        ),
        (missing, FileNotFoundError, "nowhere is not a folder"),
        (partly, RecipeError, "cannot plan this recipe: Missing required parameter weight for .*embed_tokens"),
        (nothing, RecipeError, r"add up to zero; .*Change a weight, or write normalize: false"),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": str(home / "a"), "layer_range": [1, 99]}]}],
            },
            RecipeError,
            r"home/a is asked for layers 1 to 98, but has 0 to 2\. Write layer_range: \[1, 3\] or less",
        ),
    ):
        with pytest.raises(error, match=said):
            merge(recipe, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["codes", "wide"]
    for method, words in (("della", {"density": 0.95}), ("multislerp", {})):
        each = {"a": {"weight": 1, **words}, "b": {"weight": -1, **words}}
        twins = of(home, method, ("a", "b"), each=each, parameters={"normalize_weights": False})
        if method == "multislerp":
            shutil.copytree(home / "a", tmp_path / "twin")
            twins["models"] = [twins["models"][0], {"model": str(tmp_path / "twin"), "parameters": {"weight": -1}}]
            twins["models"].append({"model": str(home / "c"), "parameters": {"weight": 0}})
        with pytest.raises(RecipeError, match=r"mergekit cannot merge model\..*: (Epsilon|The weighted sum)"):
            merge(twins, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError):
        merge(GOOD, tmp_path / "wide")
    with pytest.raises(RecipeError, match="no GPU here"):
        plan(read_recipe(of(home, "model_stock")), multi_gpu=True)


# --- what our stream does beside the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", ["passthrough", "slerp", "dare_ties"])
def test_stacked_layers(method, family, homes, tmp_path, monkeypatch):
    """More layers than any input has: mergekit's tensors, a configuration that counts and names them, seeded as ever."""
    home = homes(family)
    ranges = [(0, 2), (1, 3), (0, 2)]
    models = {"passthrough": ["a"], "slerp": ["base", "a"], "dare_ties": ["base", "a", "b"]}[method]
    recipe = {
        "merge_method": method,
        "slices": [
            {"sources": [{"model": str(home / n), "layer_range": [*own]} for n, own in zip(models, each, strict=False)]}
            for each in zip(ranges, ranges[1:] + ranges[:1], ranges, strict=True)  # the first source's layers count
        ],
    }
    if method != "passthrough":
        recipe |= {"base_model": str(home / "base"), "parameters": {"t": [0, 1], "weight": 0.5, "density": 0.6}}
    read = read_recipe(recipe)
    assert "6 layers, from 0-1, 1-2, 0-1" in str(plan(read))
    done = merge(read, tmp_path / "ours")
    assert done.road == "stream"
    assert "tensors merged by our stream" in str(done)
    assert "no undo: no model has these layers, so that there is none to go back to" in done.checks
    assert not any("asked not to" in check for check in done.checks)
    assert Checkpoint(tmp_path / "ours").anatomy.n_layers == 6
    assert done.base_hash == Checkpoint(home / models[0]).hash()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
    ours = tensors_of(tmp_path / "ours")
    if method == "dare_ties":
        monkeypatch.setattr("surgery.merging.running._SHARD", 60_000)
        again = merge(read, tmp_path / "again")
        assert again.hash == done.hash
        sharded = Checkpoint(tmp_path / "again")
        sizes = [sum(t.end - t.begin for t in sharded.tensors.values() if t.file == file) for file in sharded.files]
        assert len(sizes) > 2
        assert max(sizes) <= 60_000
        assert min(sizes[:-1]) > 30_000  # full, but for the last
    if method == "passthrough":
        source = tensors_of(home / "a")
        layers = [layer for r in ranges for layer in range(*r)]
        for name, w in ours.items():
            at = name.split(".")[2] if "layers" in name else ""
            assert torch.equal(w, source[name.replace(f"layers.{at}.", f"layers.{layers[int(at)]}.") if at else name])
    elif method == "slerp" and family == "llama":  # of the others mergekit writes a configuration that does not load
        assert furthest(by_mergekit(recipe, tmp_path / "theirs"), ours) == 0
    if family == "gemma2":
        kinds = json.loads((tmp_path / "ours" / "config.json").read_text())["layer_types"]
        before = json.loads((home / "base" / "config.json").read_text())["layer_types"]
        assert kinds == [before[i] for r in ranges for i in range(*r)]


@pytest.mark.parametrize("name", ["layout", "layout.made", ".done", "model"])
def test_what_a_stacked_merge_is_called_matters_to_nothing(name, homes, tmp_path, capfd):
    """A merge's own folders on the way have names too; the bar has the one that was asked for."""
    home = homes("llama")
    pieces = [{"sources": [{"model": str(home / "a"), "layer_range": [*span]}]} for span in ((0, 2), (1, 3))]
    recipe = {"merge_method": "passthrough", "slices": pieces}
    done, plain = merge(recipe, tmp_path / name, progress=True), merge(recipe, tmp_path / "plain")
    assert f"writing {name}: " in capfd.readouterr().err
    assert done.hash == plain.hash
    assert sorted(p.name for p in done.folder.iterdir()) == sorted(p.name for p in plain.folder.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "plain"])


@pytest.mark.parametrize("order", [("base", "a"), ("a", "base")], ids=["bf16 first", "fp32 first"])
@pytest.mark.parametrize("ranges", [((0, 1), (1, 3)), ((0, 2), (1, 3))], ids=["as many layers", "more layers"])
def test_stacked_layers_keep_the_wider_dtype(order, ranges, tmp_path):
    """Layers of a bf16 and of a float32 model: nothing is rounded away, whichever comes first."""
    home = tmp_path / "home"
    save_tiny("llama", home / "base", dtype=torch.bfloat16)
    save_tiny("llama", home / "a", seed=1)
    pieces = [
        {"sources": [{"model": str(home / name), "layer_range": [*span]}]}
        for name, span in zip(order, ranges, strict=True)
    ]
    merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    ours, at = tensors_of(tmp_path / "out"), 0
    for name, span in zip(order, ranges, strict=True):
        source = tensors_of(home / name)
        for layer in range(*span):
            part = "mlp.up_proj.weight"
            found = ours[f"model.layers.{at}.{part}"]
            assert found.dtype == torch.float32
            assert torch.equal(found, source[f"model.layers.{layer}.{part}"].float())
            at += 1


def test_shards_are_those_of_the_base(tmp_path):
    home = siblings("llama", tmp_path / "home", shards=3)
    merge(of(home, "model_stock"), tmp_path / "out")
    files = lambda folder: sorted(p.name for p in folder.glob("*.safetensors*"))  # noqa: E731
    assert files(tmp_path / "out") == files(home / "base")
    theirs = by_mergekit(of(home, "model_stock"), tmp_path / "theirs")
    assert furthest(theirs, tensors_of(tmp_path / "out")) == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_heads(tied, tmp_path):
    """A tied head is its embedding, merged once; one model's own head among tied ones is merged where the base has one."""
    home = siblings("llama", tmp_path / "home", tied=tied)
    stray = load_file(home / "a" / "model.safetensors")
    if tied:  # a file that repeats the head
        stray["lm_head.weight"] = stray["model.embed_tokens.weight"].clone()
        save_file(stray, home / "a" / "model.safetensors", metadata={"format": "pt"})
    done = merge(of(home, "task_arithmetic", each=WEIGHTS), tmp_path / "out")
    assert ("lm_head.weight" in done.hashes) == (not tied)
    assert any("head tied to embed" in check for check in done.checks) == tied
    if tied:  # and now the base's file repeats it
        stray = load_file(home / "base" / "model.safetensors")
        stray["lm_head.weight"] = stray["model.embed_tokens.weight"].clone()
        save_file(stray, home / "base" / "model.safetensors", metadata={"format": "pt"})
        made = plan(read_recipe(of(home, "task_arithmetic", each=WEIGHTS)))
        assert "lm_head.weight" not in made.rules
        found = tensors_of(merge(made.recipe, tmp_path / "both").folder)
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "breadcrumbs", "sce", "linear", "karcher"])
def test_the_base_alone_is_itself(method, homes, tmp_path):
    recipe = of(homes("llama"), method, ("base",), parameters={"weight": 0.5, "density": 0.5})
    assert furthest(by_mergekit(recipe, tmp_path / "theirs"), tensors_of(merge(recipe, tmp_path / "out").folder)) == 0


TOKENS = {
    "a model that is not merged": ({"!": {"source": "c", "force": True}}, r"'!' is to come from .*home/c, which is not among the merged models\."),
    "a token that the model lacks": ({"<new>": {"source": "a"}}, r"'<new>' is to come from .*home/a, whose tokenizer has no '<new>'\."),
    "another token that it lacks": (
        {"!": {"source": {"kind": "model_token", "model": "a", "token": "<new>"}}}, r"'!' is to come from .*home/a, whose tokenizer has no '<new>'\.",
    ),
    "an id without a row": (
        {"!": {"source": {"kind": "model_token", "model": "a", "token_id": 100}}},
        r"'!' is to come from .*home/a, whose embedding has 100 rows and none of id 100\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENS)
def test_tokens_that_come_from_nowhere(case, homes, tmp_path):
    """Said before anything is computed, by the check too."""
    home = homes("llama")
    tokens, said = TOKENS[case]
    wanted = yaml.safe_load(re.sub(r"\b(source|model): ([ac])\b", rf"\1: {home}/\2", yaml.safe_dump(tokens)))
    recipe = of(home, "task_arithmetic", ("a", "b"), each=WEIGHTS, tokenizer={"source": "base", "tokens": wanted})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=rf"tokenizer: token {said}"):
        plan(read_recipe(tmp_path / "recipe.yml"))
    (problem,) = check_recipe(tmp_path / "recipe.yml").problems
    assert re.search(said.removesuffix(r"\."), problem.found)


def test_a_head_that_the_output_has_no_place_for(homes, tmp_path):
    """Refused by every road, unless the model that has it counts for nothing."""
    save_tiny("llama", tmp_path / "base", tied=True)
    sibling(tmp_path / "base", tmp_path / "tied", 1)
    save_tiny("llama", tmp_path / "untied", tied=False)
    said = r"untied has a head of its own \(lm_head\.weight\), and .*base, .* ties .* Make .*untied the base_model, or untie .*base first"
    both = of(
        tmp_path, "task_arithmetic", ("tied", "untied"), each={"tied": {"weight": 0.5}, "untied": {"weight": 0.5}}
    )
    pieces = [
        {"sources": [{"model": str(tmp_path / name), "layer_range": [*span]}]}
        for name, span in (("base", (0, 2)), ("untied", (0, 3)))
    ]
    stack = {"merge_method": "passthrough", "slices": pieces}
    for recipe in (both, of(tmp_path, "model_stock", ("tied", "untied")), stack):
        for how in ({}, {"tokenizer": {"source": "base" if "base_model" in recipe else str(tmp_path / "tied")}}):
            with pytest.raises(RecipeError, match=said):
                merge(recipe | how, tmp_path / "out")
    both["models"][1]["parameters"]["weight"] = 0.0
    alone = of(tmp_path, "task_arithmetic", ("tied",), each={"tied": {"weight": 0.5}})
    assert merge(both, tmp_path / "nothing").hash == merge(alone, tmp_path / "alone").hash
    with pytest.raises(
        RecipeError, match=r"untied, .*, has a head of its own, and the model of the last layers.* ties its"
    ):
        merge({"merge_method": "passthrough", "slices": pieces[::-1]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_table_lists_are_carried(homes, tmp_path):
    home = shutil.copytree(homes("llama"), tmp_path / "home")
    for name in ("base", *NAMES):
        tensors = load_file(home / name / "model.safetensors")
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.arange(6.0) + len(name)
        save_file(tensors, home / name / "model.safetensors", metadata={"format": "pt"})
    recipe = of(home, "ties", each=DENSE)
    made = plan(read_recipe(recipe))
    assert made.carried == ("model.layers.1.self_attn.rotary_emb.inv_freq",)
    done = merge(recipe, tmp_path / "out")
    assert "1 tensors outside the rule are the base's own" in done.checks[0]
    kept = tensors_of(tmp_path / "out")["model.layers.1.self_attn.rotary_emb.inv_freq"]
    assert torch.equal(kept, tensors_of(home / "base")["model.layers.1.self_attn.rotary_emb.inv_freq"])


def changed(folder: Path, more, **config) -> None:
    """Give a model more tensors, and a configuration that says so."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


WITHOUT_A_PLACE = {
    "biases": (
        lambda tensors: {n.replace("weight", "bias"): w[:, 0].clone() for n, w in tensors.items() if "self_attn" in n},
        {"attention_bias": True},
        "lacks 12 tensors that .*b has, first 0.attn.k.bias",
        r"home/b has 12 weights that .*base, like which the result is laid out, has no place for, first 0\.attn\.k\.bias, 0\.attn\.o\.bias, 0\.attn\.q\.bias: "
        r".* Use models with the same tensors\.",
    ),
    "a layer": (
        lambda tensors: {n.replace("layers.2", "layers.3"): w.clone() for n, w in tensors.items() if "layers.2" in n},
        {"num_hidden_layers": 4},
        "has 4 layers, and .*base 3",
        r"home/b has 4 layers, and .*base 3\. Take ranges of layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_A_PLACE)
def test_weights_that_the_output_has_no_place_for(case, homes, tmp_path):
    """A model without some of its weights is another model: refused, by the check and by the merge."""
    more, config, found, said = WITHOUT_A_PLACE[case]
    home = shutil.copytree(homes("llama"), tmp_path / "home")
    changed(home / "b", more, **config)
    recipe = of(home, "task_arithmetic", each=WEIGHTS)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (problem,) = (p for p in check_recipe(tmp_path / "recipe.yml").problems if p.severity == "error")
    assert re.search(found, problem.found)
    with pytest.raises(RecipeError, match=said):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("road", ["stream", "executor"])
def test_tensors_that_the_output_leaves_behind_are_named(road, homes, tmp_path, gpu):
    """What the family does not know of, as a head for scores: said before and after, by the check and in the record."""
    home = shutil.copytree(homes("llama"), tmp_path / "home")
    changed(home / "b", lambda _: {f"score.{i}.weight": torch.ones(2) for i in range(4)})
    recipe = of(home, "task_arithmetic", each=WEIGHTS)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    report = check_recipe(tmp_path / "recipe.yml")
    assert report.ok
    (problem,) = report.problems
    assert problem.severity == "warning"
    first = "first score.0.weight, score.1.weight, score.2.weight"
    assert f"has 4 tensors that {home / 'base'} lacks, {first}: the result is without them" in problem.found
    assert f"4 tensors of {home / 'b'} are left behind, {first}" in str(plan(read_recipe(recipe)))
    done = merge(recipe, tmp_path / "out", multi_gpu=road == "executor")
    assert done.road == road
    assert f"4 tensors of {home / 'b'} are left behind, {first}" in done.checks[0]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({**recipe, "base_model": str(home / "b")}))
    report = check_recipe(tmp_path / "recipe.yml")  # the other way round the base keeps its own
    assert report.ok, str(report)
    assert {p.severity for p in report.problems} == {"note"}


def test_mixed_dtypes_are_promoted_as_by_mergekit(homes, tmp_path):
    home = shutil.copytree(homes("llama", torch.bfloat16), tmp_path / "home")
    shutil.rmtree(home / "a")
    sibling(home / "base", home / "a", 1, dtype=torch.float32)
    recipe = of(home, "model_stock")
    merge(recipe, tmp_path / "ours")
    assert furthest(by_mergekit(recipe, tmp_path / "theirs"), tensors_of(tmp_path / "ours")) == 0
    merge(recipe, tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path / "half").values()} == {torch.float16}
    for name in "bc":  # norms in float32 in each of them: a model's own dtypes are nothing to promote
        kept = {n: t.float() if "norm" in n else t for n, t in tensors_of(home / name).items()}
        save_file(kept, home / name / "model.safetensors", metadata={"format": "pt"})
    merge(of(home, "linear", ("b", "c"), base=False, parameters={"weight": 0.5}), tmp_path / "own")
    assert {n: t.dtype for n, t in tensors_of(tmp_path / "own").items()} == {n: t.dtype for n, t in kept.items()}


def test_adapters(homes, tmp_path):
    """`model+adapter` is the model with its adapter merged in."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    home = homes("llama")
    module = get_peft_model(
        AutoModelForCausalLM.from_pretrained(home / "a"),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    )
    generator = torch.Generator().manual_seed(0)
    for name, w in module.named_parameters():
        if "lora_" in name:
            w.data.normal_(0, 0.2, generator=generator)
    module.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(home / "a"), tmp_path / "adapter"
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    recipe = of(home, "ties", ("b",), parameters={"weight": 0.5, "density": 0.5})
    typed, plain = (
        recipe | {"models": [*recipe["models"], {"model": m}]}
        for m in (f"{home / 'a'}+{tmp_path / 'adapter'}", str(tmp_path / "whole"))
    )
    done = merge(typed, tmp_path / "typed")
    assert done.road == "stream"
    merge(plain, tmp_path / "plain")
    assert furthest(tensors_of(tmp_path / "typed"), tensors_of(tmp_path / "plain")) < 1e-6
    linear = of(home, "linear", ("a",), base=False, parameters={"weight": 1})
    linear["models"][0]["model"] += f"+{tmp_path / 'adapter'}"
    merge(linear, tmp_path / "one")
    assert furthest(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "whole")) < 1e-6
    each = {"b": {"weight": 0.75}, "c": {"weight": -0.75}}  # whose sum, 0, nothing is divided by
    for name, more in {"lambda": {"lambda": 0.5, "normalize": True}, "three quarters": {}}.items():
        chosen = ("b", "c") if more else ("b",)
        sums = of(home, "task_arithmetic", chosen, each={m: each[m] for m in chosen}, parameters=more)
        for base in (f"{home / 'a'}+{tmp_path / 'adapter'}", str(tmp_path / "whole")):
            merge(sums | {"base_model": base}, tmp_path / name / ("typed" if "+" in base else "plain"))
        found, expected = (tensors_of(tmp_path / name / kind) for kind in ("typed", "plain"))
        assert furthest(found, expected) < 1e-6
        start, b, c = (tensors_of(folder) for folder in (tmp_path / "whole", home / "b", home / "c"))
        up = "model.layers.1.mlp.down_proj.weight"
        by_hand = start[up] + (0.375 * (b[up] - c[up]) if more else 0.75 * (b[up] - start[up]))
        torch.testing.assert_close(found[up], by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "ram", "linear"])
@pytest.mark.parametrize(
    ("family", "modules", "together"),
    [
        ("llama", ["q_proj", "down_proj"], 0),
        ("phi3", ["qkv_proj", "down_proj"], 1),  # of a fused tensor rows are not to be had by themselves
        ("gpt2", ["c_attn", "c_proj"], 1),
    ],
)
def test_an_adapters_change_is_put_together_once_at_most(
    family, modules, together, method, homes, tmp_path, monkeypatch, unchecked
):
    """`unchecked`: checking the type of a mapping reads one of its tensors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    home = homes(family, tied=family != "phi3")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(home / "a"),
        LoraConfig(r=3, target_modules=modules, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    write(Checkpoint(home / "a") + Adapter(tmp_path / "adapter", Checkpoint(home / "a")), tmp_path / "whole")
    monkeypatch.setattr(rules, "_ROWS", 256)  # many strips
    monkeypatch.setattr(writing, "_CHUNK", 256)
    counted, real = Counter(), Adapter._read

    def read(self, site, rows):
        counted.update([site] if rows == slice(None) else [])
        return real(self, site, rows)

    monkeypatch.setattr(Adapter, "_read", read)
    found = {}
    for name, model in (("typed", f"{home / 'a'}+{tmp_path / 'adapter'}"), ("plain", str(tmp_path / "whole"))):
        recipe = of(home, method, ("b",), parameters={"weight": 0.5, "density": 0.5}, dtype="float32")
        recipe["models"].append({"model": model})
        found[name] = tensors_of(merge(recipe, tmp_path / name).folder)
    assert furthest(found["typed"], found["plain"]) < 1e-5
    assert max(counted.values(), default=0) <= together


# --- mergekit's executor ------------------------------------------------------------------------------------------------------


def test_what_the_executor_makes_is_judged(homes, tmp_path, gpu):
    home = shutil.copytree(homes("llama"), tmp_path / "home")
    recipe = of(home, "model_stock", tokenizer={"source": "base"})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    done = merge(recipe, tmp_path / "out", multi_gpu=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert done.road == "executor"
    assert "by mergekit's executor, because several GPUs" in done.checks[0]
    assert "every value finite" in done.checks
    assert furthest(by_mergekit(recipe, tmp_path / "theirs"), tensors_of(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "generation_config.json").is_file()
    tensors = load_file(home / "a" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, home / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight has values that are NaN"):
        merge(recipe, tmp_path / "bad", multi_gpu=True)
    gone = str(tmp_path / "theirs" / "x")
    with pytest.raises(FileNotFoundError, match="x is not a folder"):
        merge(of(home, "model_stock", tokenizer={"source": gone}), tmp_path / "bad")
    shutil.copytree(home / "b", tmp_path / "theirs" / "x")
    (tmp_path / "theirs" / "x" / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match="mergekit's executor cannot run this recipe"):
        merge(of(home, "model_stock", ("b", "c"), tokenizer={"source": gone}), tmp_path / "bad", multi_gpu=True)
    with pytest.raises(RecipeError, match=r"mergekit cannot build the tokenizer: .*\. Leave the tokenizer out"):
        merge(of(home, "model_stock", ("b", "c"), tokenizer={"source": gone}), tmp_path / "bad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "theirs"]


@pytest.mark.parametrize("source", [None, "base", "union"])
def test_what_the_executor_is_proved_against(source, homes, tmp_path, monkeypatch, gpu):
    """The base, as far as the recipe leaves it alone: its side files, and its configuration."""
    from mergekit import merge as mergekits

    home = shutil.copytree(homes("llama"), tmp_path / "home")
    (home / "base" / "additional_chat_templates").mkdir()
    theirs = {
        "additional_chat_templates/tools.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}",
        "notes.txt": "x",
    }
    for name, text in theirs.items():
        (home / "base" / name).write_text(text)
    real, faults = mergekits.run_merge, []

    def run(config, out, options, **rest):
        real(config, out, options, **rest)
        for fault in faults:
            path = Path(out) / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fault))

    monkeypatch.setattr(mergekits, "run_merge", run)
    recipe = of(home, "model_stock", **({} if source is None else {"tokenizer": {"source": source}}))
    done = merge(
        recipe, tmp_path / "out", multi_gpu=True, seal=lambda f, m: Record("merge", {}, checks=m.checks).save(f)
    )
    assert done.road == "executor"
    assert done.base_hash == Checkpoint(home / "base").hash() != done.hash
    for name, text in theirs.items():
        assert (tmp_path / "out" / name).read_text() == text
    if source is None:
        same = (tmp_path / name / "tokenizer.json" for name in ("home/base", "out"))
        assert len({path.read_bytes() for path in same}) == 1
    assert any("side files are the base's" in check for check in done.checks)
    assert not any("the source's" in check or "those computed" in check for check in done.checks)
    assert sum("as predicted" in check and "its own" not in check for check in done.checks) == 1
    with pytest.raises(CheckpointError, match="mergekit's executor wrote every tensor anew"):
        undo(tmp_path / "out", tmp_path / "back")
    faults.append({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    with pytest.raises(VerificationError, match=r"logits are up to .* from the predicted ones"):
        merge(recipe, tmp_path / "bad", multi_gpu=True)
    faults.append({"num_hidden_layers": 4})
    with pytest.raises(VerificationError, match=r"written model failed to load: it is a llama of 4 layers but lacks 9"):
        merge(recipe, tmp_path / "bad", multi_gpu=True)


def test_a_family_without_a_table_is_judged_by_name(tmp_path):
    from transformers import AutoModelForCausalLM, Starcoder2Config

    config = Starcoder2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    characters().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(NAMES, 1):
        sibling(tmp_path / "base", tmp_path / name, seed)
    recipe = of(tmp_path, "task_arithmetic", each=WEIGHTS)
    done = merge(recipe, tmp_path / "out")
    assert done.road == "executor"
    assert "a family without a table" in done.checks[0]
    assert any(
        re.fullmatch(r"(\d+) of \1 tensors as loaded by transformers equal those in the files", c) for c in done.checks
    )
    assert furthest(by_mergekit(recipe, tmp_path / "theirs"), tensors_of(tmp_path / "out")) == 0
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    report = check_recipe(tmp_path / "recipe.yml")
    assert report.ok, str(report)
    assert any(p.severity == "warning" and p.kind == "family" for p in report.problems)
    assert report.forecast is not None
    assert report.forecast.memory is None
    assert "memory not known, as mergekit's own executor does the merge" in str(report)
    assert not check_model(str(tmp_path / "base")).ok


@pytest.mark.parametrize("template", ["auto", "chatml", "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}"])
def test_chat_templates(template, homes, tmp_path):
    from transformers import AutoTokenizer

    home = homes("llama")
    merge(of(home, "model_stock", chat_template=template), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    if template == "auto":
        assert found.strip() == AutoTokenizer.from_pretrained(home / "a").chat_template.strip()
    elif template == "chatml":
        assert "<|im_start|>" in found
    else:
        assert found == template
    with pytest.raises(RecipeError, match=r"chat_template: Invalid chat template: nonsense\. Give auto"):
        merge(of(home, "model_stock", chat_template="nonsense"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("recipe", ["linear", "sliced"])
def test_each_configuration_is_read_once_for_the_plan(recipe, tiny, monkeypatch):
    """mergekit reads it for every slice and question; a large recipe is then as slow as its models are deep."""
    from mergekit import common

    models = ["tiny/base", "tiny/a", "tiny/b"]
    if recipe == "linear":
        said = {"models": [{"model": name, "parameters": {"weight": 1.0}} for name in models]}
    else:
        pieces = [[{"model": name, "layer_range": [0, 1], "parameters": {"weight": 1.0}} for name in models]] * 2
        said = {"slices": [{"sources": sources} for sources in pieces]}
    asked = read_recipe({"merge_method": "linear", "dtype": "float32", **said})
    seen = Counter()
    real, method = common.AutoConfig.from_pretrained, common.ModelReference.config
    monkeypatch.setattr(
        common.AutoConfig, "from_pretrained", lambda path, **options: seen.update([path]) or real(path, **options)
    )
    made = plan(asked)
    by_mergekit = {path: count for path, count in seen.items() if not isinstance(path, Path)}
    assert by_mergekit == dict.fromkeys(models, 1)
    assert common.ModelReference.config is method
    assert made.dtype == torch.float32

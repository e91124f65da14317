"""Merges of models whose files name their tensors otherwise than mergekit's tables of the architectures do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from surgery.checkpoint import Checkpoint
from surgery.merging import RecipeError, merge, plan, read_recipe
from surgery.preflight import check_recipe
from tests.families import SPARSE_FAMILIES, save_tiny, save_tiny_vlm
from tests.siblings import (
    DENSE,
    DETERMINISTIC,
    NAMES,
    RANDOM,
    WEIGHTS,
    by_mergekit,
    furthest,
    of,
    tensors_of,
)


def rewrite(folder: Path, change) -> None:
    """Replace the tensors of a model in one file."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def relaid(home: Path, to: Path, like: Path) -> Path:
    """The models of `home` with the names of the files of `like`."""
    names = {tuple(sites): name for name, sites in Checkpoint(like).anatomy.stored_in().items()}
    for model in ("base", *NAMES):
        sites = Checkpoint(home / model).anatomy.stored_in()
        shutil.copytree(home / model, to / model)
        rewrite(to / model, lambda tensors, s=sites: {names[tuple(s[n])]: w for n, w in tensors.items()})
    return to


def other_layout(family: str, home: Path, folder: Path, layout: str) -> Path:
    return relaid(home, folder / layout, save_tiny_vlm(family, folder / f"like {layout}", layout))


def with_buffers(home: Path, to: Path) -> Path:
    """GPT-NeoX as files had it before transformers 5."""

    def added(tensors):
        for layer in range(3):
            at = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{at}.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
            tensors[f"{at}.rotary_emb.inv_freq"] = torch.ones(2)
            tensors[f"{at}.masked_bias"] = torch.tensor(-1e9)
        return tensors

    for model in ("base", *NAMES):
        rewrite(shutil.copytree(home / model, to / model), added)
    return to


def with_heads(home: Path, to: Path) -> Path:
    """Tied models whose files repeat the embedding as a head."""
    for model in ("base", *NAMES):
        repeat = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}  # noqa: E731
        rewrite(shutil.copytree(home / model, to / model), repeat)
    return to


# --- parity with mergekit, which merges the same models out of other files ----------------------------------------------------

# what mergekit merges in files of another kind, and how to get them
KNOWN = {
    "gpt-neox": ({"tied": False}, with_buffers),
    "phi3": ({}, with_heads),
    "gemma3 (vision)": ({}, lambda home, to: other_layout("gemma3", home, to, "old")),
    "qwen2.5-vl (vision)": ({}, lambda home, to: other_layout("qwen2.5-vl", home, to, "old")),
}
CASES = ("linear-gradient", "slerp-gradient", "ties", "sce", "model_stock")  # entry by entry, and by all of a tensor


@pytest.fixture(scope="module")
def theirs(homes, tmp_path_factory):
    made = {}

    def of_family(family):
        if family not in made:
            options, make = KNOWN[family]
            made[family] = make(homes(family, **options), tmp_path_factory.mktemp("theirs") / "home")
        return made[family]

    return of_family


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("case", CASES)
def test_parity_with_other_files(case, family, homes, theirs, tmp_path):
    home = homes(family, **KNOWN[family][0])
    by_mergekit(DETERMINISTIC[case](theirs(family)), tmp_path / "theirs")
    done = merge(DETERMINISTIC[case](home), tmp_path / "ours")
    assert done.road == "stream"
    ours, reached = Checkpoint(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    theirs_at = {tuple(sites): name for name, sites in Checkpoint(theirs(family) / "base").anatomy.stored_in().items()}
    apart = {}
    for name, sites in ours.anatomy.stored_in().items():
        there = theirs_at[tuple(sites)]
        if there in reached and not ("gradient" in case and "merger.mlp" in name):  # its two are not layers to everyone
            apart[name] = float((ours.stored(name).double() - reached[there].double()).abs().max())
    assert len(ours.tensors) - len(apart) <= (
        11 if "gemma3" in family else 4
    )  # the pooling head of SigLIP is left out by mergekit
    assert max(apart.values()) < 1e-6
    if "linear" not in case and "task_arithmetic" not in case:
        assert max(apart.values()) == 0


@pytest.mark.parametrize(
    "case", ["linear", "linear-gradient", "task_arithmetic-gradient", "nearswap", "passthrough", "passthrough-scale"]
)
def test_parity_of_experts(case, homes, tmp_path):
    """mergekit takes all experts of a layer for one tensor; where an entry depends on its like alone that is the same, filters included."""
    recipe = DETERMINISTIC[case](homes("mixtral"))
    by_mergekit(recipe, tmp_path / "theirs")
    assert merge(recipe, tmp_path / "ours").road == "stream"
    ours, theirs = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "theirs")
    assert set(tensors_of(tmp_path / "ours")) == set(tensors_of(homes("mixtral") / "base"))
    assert list(ours) == list(theirs)
    assert max(float((ours[site] - theirs[site]).abs().max()) for site in ours) < 1e-6


RULES = {
    "ties": (DENSE, {}),
    "slerp": ({}, {"t": 0.3}),
    "model_stock": ({}, {}),
    "breadcrumbs": ({n: {**p, "gamma": 0.02} for n, p in DENSE.items()}, {}),
    "sce": ({}, {"select_topk": 0.4}),
    "multislerp": (WEIGHTS, {}),
}


@pytest.mark.parametrize("family", [*SPARSE_FAMILIES, "qwen2-vl (vision)", "llava (vision)"])
@pytest.mark.parametrize("method", RULES)
def test_a_rule_is_called_on_each_tensor_of_the_files(method, family, homes, tmp_path):
    each, shared = RULES[method]
    home, names = homes(family), ("a",) if method == "slerp" else NAMES
    merge(of(home, method, names, each=each, parameters=shared), tmp_path / "out")
    ours, models = tensors_of(tmp_path / "out"), [tensors_of(home / n) for n in ("base", *names)]
    assert ours.keys() == models[0].keys()
    parameters = {key: [each[n][key] for n in names] for key in next(iter(each.values()), {})} | shared
    for name, found in ours.items():
        by_hand = merge_tensors([m[name] for m in models], method, parameters=parameters, base_index=0)
        assert torch.equal(found, by_hand), name


@pytest.mark.parametrize("family", ["mixtral", "gpt-neox"])
@pytest.mark.parametrize("method", sorted(RANDOM))
def test_methods_that_throw_dice(method, family, homes, tmp_path):
    home = homes(family)
    nothing = of(home, method, parameters={"weight": 0, "density": 0.5})
    done = merge(nothing, tmp_path / "nothing")
    assert done.hash == done.base_hash
    recipe = of(home, method, each=WEIGHTS, parameters={"density": 0.5})
    first, again = (merge(recipe, tmp_path / name, seed=seed).hash for name, seed in (("first", 1), ("again", 1)))
    assert first == again != merge(recipe, tmp_path / "other", seed=2).hash


# --- files that do not agree with one another ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2-vl", "qwen2.5-vl"])
@pytest.mark.parametrize("case", ["linear", "ties"])
def test_models_in_several_layouts(case, family, homes, tmp_path):
    """Old files and new ones in one merge: the sites are the same, and the result has the names of the base."""
    home = homes(f"{family} (vision)")
    old = other_layout(family, home, tmp_path, "old")
    mixed = tmp_path / "mixed"
    for name, source in (("base", home), ("a", home if case == "linear" else old), ("b", old), ("c", home)):
        shutil.copytree(source / name, mixed / name)
    merge(DETERMINISTIC[case](home), tmp_path / "one layout")
    merge(DETERMINISTIC[case](mixed), tmp_path / "several")
    assert furthest(tensors_of(tmp_path / "one layout"), tensors_of(tmp_path / "several")) == 0
    nothing = merge(of(mixed, "task_arithmetic", ("a",), parameters={"weight": 0}), tmp_path / "nothing")
    assert nothing.hash == nothing.base_hash
    whole = merge(of(mixed, "task_arithmetic", ("a",), parameters={"weight": 1}), tmp_path / "whole")
    assert whole.hash == Checkpoint(home / "a").hash()


def test_buffers_that_one_model_still_has(homes, tmp_path):
    """GPT-NeoX of old files merged with what transformers 5 saved of it: the base's buffers stay."""
    home = homes("gpt-neox", tied=False)
    old = with_buffers(home, tmp_path / "old")
    for name, base, other in (("kept", old, home), ("none", home, old)):
        recipe = {
            "merge_method": "ties",
            "base_model": str(base / "base"),
            "parameters": {"weight": 0.5, "density": 0.4},
        }
        made = merge(recipe | {"models": [{"model": str(other / "a")}, {"model": str(other / "b")}]}, tmp_path / name)
        assert made.hashes.keys() == tensors_of(base / "base").keys()
    kept = tensors_of(tmp_path / "kept")
    expected = tensors_of(old / "base") | tensors_of(tmp_path / "none")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in kept.items())


def test_heads(homes, tmp_path):
    """As in families that mergekit's tables fit: merged where the base has one, refused where the base would lose it."""
    tied, untied = homes("phi3"), homes("phi3", tied=False)
    mixed = {"base_model": str(untied / "base"), "models": [{"model": str(tied / "a")}, {"model": str(untied / "b")}]}
    merge({"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, **mixed}, tmp_path / "out")
    base, a, b = (tensors_of(f) for f in (untied / "base", tied / "a", untied / "b"))
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    by_hand = base[head] + 0.5 * (a[embed] - base[head]) + 0.5 * (b[head] - base[head])
    torch.testing.assert_close(tensors_of(tmp_path / "out")[head], by_hand, rtol=0, atol=1e-6)
    lost = {"base_model": str(tied / "base"), "models": [{"model": str(untied / "a")}]}
    with pytest.raises(RecipeError, match=r"has a head of its own \(lm_head\.weight\).*would be lost"):
        merge({"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, **lost}, tmp_path / "bad")


# --- layers -------------------------------------------------------------------------------------------------------------------


def stack(home: Path, *ranges: tuple[str, int, int]) -> dict:
    pieces = [{"sources": [{"model": str(home / name), "layer_range": [first, last]}]} for name, first, last in ranges]
    return {"merge_method": "passthrough", "slices": pieces}


@pytest.mark.parametrize("kind", ["mixtral", "gpt-neox", "phi3"])
def test_stacked_layers(kind, homes, tmp_path):
    home = homes(kind)
    recipe = stack(home, ("base", 0, 2), ("a", 1, 3)) | (
        {"tokenizer": {"source": "union"}} if kind == "mixtral" else {}
    )
    done = merge(recipe, tmp_path / "out")
    assert done.road == "stream"
    ours, base, a = Checkpoint(tmp_path / "out"), Checkpoint(home / "base"), Checkpoint(home / "a")
    assert ours.anatomy.n_layers == 4
    for site in ours:
        source, layer = (base, site.layer) if (site.layer or 0) < 2 else (a, (site.layer or 0) - 1)
        source = a if str(site).startswith(("norm", "head")) else source
        there = str(site) if site.layer is None else str(site).replace(f"{site.layer}.", f"{layer}.", 1)
        assert torch.equal(ours[site], source[there]), site


def test_layers_that_stay_where_they_are(homes, tmp_path):
    """Also where one is dense and the others have experts, and then a recipe's gradient runs over them as ever."""
    home = homes("qwen3-moe")
    whole = DETERMINISTIC["slerp-gradient"](home)
    sources = [{"model": str(home / n), "layer_range": [0, 3]} for n in ("base", "a")]
    sliced = {k: v for k, v in whole.items() if k != "models"} | {"slices": [{"sources": sources}]}
    assert merge(whole, tmp_path / "whole").hash == merge(sliced, tmp_path / "sliced").hash


def with_gap(home: Path) -> dict:
    """A recipe by a tokenizer that numbers its last token past the others."""
    folder = home.parent / "gap"
    if not folder.exists():
        shutil.copytree(home / "base", folder)
        said = json.loads((folder / "tokenizer.json").read_text())
        last = max(said["model"]["vocab"], key=said["model"]["vocab"].get)
        said["model"]["vocab"][last] = 107
        (folder / "tokenizer.json").write_text(json.dumps(said))
    return of(home, "model_stock", tokenizer={"source": str(folder)})


def tokens(home: Path) -> dict:
    return of(home, "model_stock", tokenizer={"source": "base"})


REFUSED = {
    "layers of several kinds": (
        "qwen3-moe", lambda home: stack(home, ("base", 0, 2), ("a", 1, 3)), r"layers of .*base are not all alike.*Merge whole models",
    ),
    "layers beside a tower": (
        "qwen2-vl (vision)", lambda home: stack(home, ("base", 0, 2), ("a", 1, 3)), "is a model of several parts.*under models: instead",
    ),
    "parts of the model": (
        "gemma3 (vision)",
        lambda home: {
            "merge_method": "model_stock", "base_model": str(home / "base"),
            "modules": {"text_decoder": {"models": [{"model": str(home / n)} for n in NAMES]}},
        },
        r"gemma3 \(text_decoder, multi_modal_projector, vision_tower\).*Name the models under models: instead",
    ),
    "a tokenizer with gaps": (
        "mixtral", lambda home: with_gap(home), r"100 tokens with ids up to 107.*without gaps.*Leave the tokenizer out",
    ),
}  # fmt: skip


FORMS = {
    "models": lambda home: of(home, "model_stock"),
    "slices": lambda home: stack(home, ("base", 0, 2), ("a", 1, 3)),
    "modules": REFUSED["parts of the model"][1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt-neox", *SPARSE_FAMILIES, "gemma3 (vision)", "qwen2-vl (vision)", "llava (vision)"]
)
def test_check_says_what_merge_does(family, form, homes, tmp_path):
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(FORMS[form](homes(family))))
    report = check_recipe(tmp_path / "recipe.yml")
    try:
        plan(read_recipe(tmp_path / "recipe.yml"))
    except RecipeError:
        assert not report.ok
        assert [p.kind for p in report.problems if p.severity == "error"] == ["plan"]
    else:
        assert report.ok, str(report)
        merge(tmp_path / "recipe.yml", tmp_path / "out")


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_mergekits_table(case, homes, tmp_path):
    family, make, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said) as error:
        merge(make(homes(family)), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused_as_ever(homes, tmp_path):
    """Names that fit do not make two families one."""
    base, other = homes("mixtral") / "base", save_tiny("mixtral", tmp_path / "other")
    rewrite(other, lambda tensors: {n: w[:20] if "w2" in n else w for n, w in tensors.items()})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (base, other)],
    }
    with pytest.raises(RecipeError, match=r"experts\.\d\.w2\.weight has different shapes.*architecture and size"):
        merge(recipe, tmp_path / "out")
    recipe["models"][1]["model"] = str(homes("qwen3-moe") / "a")
    with pytest.raises(RecipeError, match="mix different architectures"):
        merge(recipe, tmp_path / "out")


# --- tokenizers --------------------------------------------------------------------------------------------------------------


def with_tokens(folder: Path, *tokens: str, added: str = "", swapped: tuple[int, int] | None = None) -> None:
    """Give a model's tokenizer more tokens, the last as an added one, and rows for them where it has none; swapped: two ids change places."""
    said, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "config.json"))
    vocabulary = said["model"]["vocab"]
    vocabulary.update({token: len(vocabulary) + i for i, token in enumerate(tokens)})
    count = len(vocabulary) + bool(added)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    said["added_tokens"] += [{"id": len(vocabulary), "content": added, **plain}] if added else []
    if swapped is not None:
        one, other = (next(t for t, i in vocabulary.items() if i == at) for at in swapped)
        vocabulary[one], vocabulary[other] = swapped[::-1]
    model = Checkpoint(folder)
    rows = {place.name for site, place in model.anatomy.places.items() if str(site) in ("embed", "head")}

    def moved(tensors):
        for name in rows & tensors.keys():
            own = tensors[name]
            more = torch.randn(count - len(own), own.shape[1], generator=torch.Generator().manual_seed(7))
            tensors[name] = own = torch.cat([own, more])
            if swapped is not None:
                own[list(swapped)] = own[list(swapped[::-1])]
        return tensors

    rewrite(folder, moved)
    config.get("text_config", config)["vocab_size"] = count
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(said))


SEEN = ("<image>", "<video>", "<begin>", "<end>")
LINED_UP = {
    "llava (vision)": ({"layout": "old"}, "union"), "gemma3 (vision)": ({"layout": "new"}, "base"),
    "qwen2-vl (vision)": ({"layout": "old", "tied": False}, "union"), "qwen2.5-vl (vision)": ({"layout": "new"}, "base"),
    "idefics3 (vision)": ({"layout": "old"}, "union"), "gpt-neox": ({"tied": False}, "union"), "qwen2-moe": ({}, "union"), "qwen3-moe": ({}, "base"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINED_UP)
def test_tokens_are_lined_up(case, homes, tmp_path):
    """One model numbers two tokens otherwise, and has a token of its own: rows are merged by token, and the config counts them."""
    options, source = LINED_UP[case]
    home = shutil.copytree(homes(case, **options), tmp_path / "home")
    for name in ("base", "a"):
        with_tokens(home / name, *SEEN)
    with_tokens(home / "b", *SEEN, added="<own>", swapped=(20, 31))
    recipe = of(home, "task_arithmetic", ("a", "b"), each=WEIGHTS, tokenizer={"source": source})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    report = check_recipe(tmp_path / "recipe.yml")
    assert report.ok, str(report)
    assert report.forecast is not None
    assert report.forecast.memory is not None
    done = merge(recipe, tmp_path / "out")
    assert done.road == "stream"
    assert "logits on 8 probe tokens as predicted" in str(done.checks)
    base, a, b, out = (Checkpoint(f) for f in (home / "base", home / "a", home / "b", tmp_path / "out"))
    assert tensors_of(tmp_path / "out").keys() == tensors_of(home / "base").keys()
    lined_up = torch.arange(104)
    lined_up[[20, 31]] = torch.tensor([31, 20])
    count = 104 if source == "base" else 105
    for site in base:
        theirs, merged = b[site], out[site]
        if str(site) in ("embed", "head"):
            assert len(merged) == count
            assert torch.equal(merged[104:], theirs[104:count])  # nobody else has it
            theirs, merged = theirs[lined_up], merged[:104]
        expected = base[site] + 0.5 * (a[site] - base[site]) + 0.3 * (theirs - base[site])
        assert torch.allclose(merged, expected, atol=1e-5), site
    before, after = (json.loads((f / "config.json").read_text()) for f in (home / "base", tmp_path / "out"))
    assert after.get("text_config", after).pop("vocab_size") == count
    assert before.get("text_config", before).pop("vocab_size") == 104
    assert after == before
    ids, own = (AutoTokenizer.from_pretrained(f).get_vocab() for f in (tmp_path / "out", home / "base"))
    assert ids == own | ({"<own>": 104} if source == "union" else {})


def test_a_vocabulary_that_all_have_changes_nothing(homes, tmp_path):
    """Thinned at random, with heads of their own, and with buffers that only the base has."""
    home = homes("gpt-neox", tied=False)
    old = with_buffers(home, tmp_path / "old")
    recipe = of(home, "dare_ties", each=DENSE) | {"base_model": str(old / "base")}
    plain, lined_up = (merge(recipe | how, tmp_path / str(len(how))) for how in ({}, {"tokenizer_source": "union"}))
    assert plain.road == lined_up.road == "stream"
    assert lined_up.hash == plain.hash


@pytest.mark.parametrize(("method", "family"), [("ties", "mixtral"), ("model_stock", "llama")])
def test_rows_of_tokens_as_mergekit_makes_them(method, family, homes, tmp_path):
    """With a token of the recipe's own, rows that fill up, and rules that look at the whole tensor."""
    home = shutil.copytree(homes(family), tmp_path / "home")
    with_tokens(home / "b", added="<own>", swapped=(20, 31))
    wanted = {"<new>": {"source": {"kind": "model_token", "model": str(home / "a"), "token": "!"}}}
    how = {"source": "union", "pad_to_multiple_of": 8, "tokens": wanted}
    recipe = of(home, method, each=DENSE if method == "ties" else {}, tokenizer=how)
    merge(recipe, tmp_path / "ours")
    by_mergekit(recipe, tmp_path / "theirs")
    ours, theirs = (tensors_of(tmp_path / f)["model.embed_tokens.weight"] for f in ("ours", "theirs"))
    assert len(ours) == json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == 104
    assert torch.equal(ours, theirs)
    name = "tokenizer.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_placeholder_that_would_have_no_row_is_refused_at_once(homes, tmp_path):
    """The model's tokenizer lacks the token of images, for which the embedding has a row: a vocabulary built anew would drop it."""
    recipe = tokens(homes("qwen2.5-vl (vision)", layout="old"))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"image_token_id 100, .* 100 tokens.*Leave the tokenizer out") as error:
        merge(recipe, tmp_path / "out")
    (problem,) = (p for p in check_recipe(tmp_path / "recipe.yml").problems if p.severity == "error")
    assert f"{problem.found.removeprefix('cannot be merged: ')}. {problem.fix}." == str(error.value)


@pytest.mark.parametrize("source", ["a", "b"])
def test_a_placeholder_that_another_tokenizer_numbers_otherwise(source, homes, tmp_path, gpu):
    home = shutil.copytree(homes("qwen2.5-vl (vision)", layout="old"), tmp_path / "home")
    for name in ("base", "a", "b", "c"):
        with_tokens(home / name, *SEEN, swapped=(20, 100) if name == "b" else None)
    recipe = of(home, "model_stock", tokenizer={"source": str(home / source)})
    if source == "a":
        with pytest.raises(
            RecipeError, match=r"several GPUs .* does not find how many tokens .*base has .* Leave that out"
        ):
            merge(recipe, tmp_path / "out", multi_gpu=True)
        merge(recipe, tmp_path / "out")
        return
    with pytest.raises(RecipeError, match=r"image_token_id 100, which is <image>.* is 20 in .*home/b"):
        merge(recipe, tmp_path / "out")

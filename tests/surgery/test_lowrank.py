"""Adapters are vectors: a base plus an adapter is what PEFT merges, and what is written as an adapter PEFT reads back."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from surgery.across import land
from surgery.adapter_names import CONFIG, WEIGHTS
from surgery.checkpoint import Checkpoint, load_module
from surgery.edits import Scale
from surgery.lowrank import Adapter, Factored, factor_pair, joined, lora_sites, save_adapter, truncated
from surgery.model import LiveWeights
from surgery.preflight.facts import Place, examine, moved_by_adapter
from surgery.sites import Site
from surgery.tensorfile import CheckpointError
from surgery.weights import apply
from surgery.writing import write
from tests.families import FAMILIES, SPARSE_FAMILIES, VLM_FAMILIES, save_tiny, save_tiny_vlm, tiny_language

IDS = torch.arange(3, 19)[None]
CLOSE = {"rtol": 1e-6, "atol": 2e-6}  # the same sums in another order, fp32


@dataclass
class Trained:
    """A base, an adapter of it that PEFT wrote, the logits with the adapter on, and the model that PEFT merges."""

    base: Checkpoint
    folder: Path
    logits: torch.Tensor
    merged: nn.Module

    def adapter(self) -> Adapter:
        return Adapter(self.folder, self.base)


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def base(family: str, tied: bool) -> Path:
        if (family, tied) not in made:
            made[family, tied] = save_tiny(family, tmp_path_factory.mktemp(family) / "base", tied=tied)
        return made[family, tied]

    return base


@pytest.fixture
def train(bases: Callable[[str, bool], Path], tmp_path: Path) -> Train:
    """An adapter with random values in every tensor it has, as if trained."""

    def run(family: str = "llama", tied: bool = True, **settings: Any) -> Trained:
        base = bases(family, tied)
        module = load_module(base, "auto")
        settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False} | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(module, LoraConfig(**settings))  # pyright: ignore[reportArgumentType]
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in sorted(model.named_parameters()):
                    if parameter.requires_grad:
                        parameter.copy_(
                            torch.randn(parameter.shape, generator=generator) * 0.3
                        )  # in place: some are tied
            folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
            model.save_pretrained(folder)
            logits = logits_of(model)
            merged = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
        return Trained(Checkpoint(base), folder, logits, merged)

    return run


@torch.no_grad()
def logits_of(module: nn.Module) -> torch.Tensor:
    return module.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def of_module(module: nn.Module, like: Checkpoint) -> LiveWeights:
    names = (name for name, _ in module.named_parameters())
    return LiveWeights(module, type(like.anatomy).of(module.config, names))  # pyright: ignore[reportArgumentType]


def edited_config(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps({**config, **changes}))
    return to


def with_tensors(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(folder, to)
    save_file({k: v.contiguous() for k, v in change(load_file(folder / WEIGHTS)).items()}, to / WEIGHTS)
    return to


# --- what PEFT merges ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "patterns": {
        "use_rslora": True,
        "target_modules": r".*(attn|attention|mlp).*(proj|q|k|v|c_attn|c_fc|dense|query_key_value|dense_h_to_4h)",
        "rank_pattern": {r"^.*\.2\..*": 5},
        "alpha_pattern": {r"1\..*(k_proj|up_proj|c_attn|qkv_proj|query_key_value)": 64, "mlp.down_proj": 2},
    },
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_plus_adapter_is_what_peft_merges(train: Train, family: str, variant: str) -> None:
    done = train(family, **VARIANTS[variant])
    adapter = done.adapter()
    assert adapter.notes == []
    sum_, expected = done.base + adapter, of_module(done.merged, done.base)
    assert set(adapter.factored()) == (set() if variant == "dora" else set(adapter))
    assert (0.5 * adapter).survival("bfloat16") == (0.5 * adapter).survival("bfloat16", done.base)
    moved = 0
    for site in done.base:
        torch.testing.assert_close(sum_[site], expected[site], **CLOSE)
        half = torch.cat([sum_.rows(site, slice(0, 5)), sum_.rows(site, slice(5, None))])
        torch.testing.assert_close(half, expected[site], **CLOSE)
        assert torch.equal(sum_[site], done.base[site]) == (site not in adapter)
        moved += site in adapter
        if site in adapter.factored():
            left, right = adapter.factors(site)
            torch.testing.assert_close(left @ right, adapter[site])
            assert left.shape[1] == adapter.rank(site) == (5 if variant == "patterns" and site.layer == 2 else 3)
    assert moved == len(adapter) >= 15


@pytest.mark.parametrize("family", FAMILIES)
def test_on_disk_too(train: Train, family: str, tmp_path: Path) -> None:
    done = train(family)
    adapter = done.adapter()
    written = write(done.base + adapter, tmp_path / "merged")
    loaded = load_module(written.folder, "auto")
    expected = done.merged.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)
    torch.testing.assert_close(logits_of(loaded), done.logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logits_of(loaded), logits_of(done.merged), rtol=1e-4, atol=1e-3)
    none = done.base + 0.0 * adapter
    assert all(torch.equal(none[s], done.base[s]) for s in none)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_attention_of_sparse_families(train: Train, family: str) -> None:
    done = train(family, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    sum_, expected = done.base + done.adapter(), of_module(done.merged, done.base)
    for site in done.base:
        torch.testing.assert_close(sum_[site], expected[site], **CLOSE)


@pytest.mark.parametrize(
    ("family", "layout"), [*((f, "old") for f in VLM_FAMILIES), ("llava", "new"), ("gemma3", "new")]
)
def test_vision_language_models(family: str, layout: str, tmp_path: Path) -> None:
    """However the file names its tensors: an adapter of the whole, and one of the language model alone."""
    base = Checkpoint(save_tiny_vlm(family, tmp_path / "base", layout))
    settings = {"r": 2, "lora_alpha": 5, "target_modules": r".*(q_proj|down_proj|fc1|qkv)", "init_lora_weights": False}
    whole = get_peft_model(load_module(base.folder, "auto"), LoraConfig(**settings))  # pyright: ignore[reportArgumentType]
    whole.save_pretrained(tmp_path / "whole")
    adapter = Adapter(tmp_path / "whole", base)
    expected = of_module(whole.merge_and_unload(), base)  # pyright: ignore[reportCallIssue]
    moved = [s for s in base if s in adapter]
    assert len([s for s in moved if s.is_unnamed]) >= 2
    assert len([s for s in moved if not s.is_unnamed]) == 6
    for site in base:
        torch.testing.assert_close((base + adapter)[site], expected[site], **CLOSE)
    tower = get_peft_model(tiny_language(family)[0], LoraConfig(**settings))  # pyright: ignore[reportArgumentType]
    tower.save_pretrained(tmp_path / "tower")
    alone = Adapter(tmp_path / "tower", base)
    assert list(alone) == [s for s in moved if not s.is_unnamed]
    again = Adapter(save_adapter(adapter, tmp_path / "again", base), base)
    assert all(torch.equal(again[s], adapter[s]) for s in moved)


EVERYTHING = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings-dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm", "input_layernorm"]},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["k_proj"], "lora_bias": True, "lora_alpha": 8},
    "some-layers": {"target_modules": ["down_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
}


def test_a_module_trained_whole_that_holds_several_sites_or_lies_transposed(train: Train) -> None:
    for family, fused in (("phi3", "qkv_proj"), ("gpt2", "c_attn")):
        done = train(
            family, tied=False, target_modules=["down_proj" if family == "phi3" else "c_fc"], modules_to_save=[fused]
        )
        sum_, expected = done.base + done.adapter(), of_module(done.merged, done.base)
        for site in done.base:
            torch.testing.assert_close(sum_[site], expected[site], **CLOSE)


@pytest.mark.parametrize("what", EVERYTHING)
def test_whatever_else_an_adapter_may_train(train: Train, what: str) -> None:
    done = train("qwen2", tied=False, **EVERYTHING[what])  # qwen2 has biases
    adapter = done.adapter()
    sum_, expected = done.base + adapter, of_module(done.merged, done.base)
    by_rows = done.adapter()  # another one, which has read nothing whole
    changed = {s for s in done.base if not torch.equal(done.base[s], expected[s])}
    assert set(adapter) == changed, "no more and no less than PEFT changes"
    facts, _ = examine("base", Place(done.base.folder))
    assert facts is not None
    assert moved_by_adapter(Place(done.folder), facts) == sum(done.base[site].numel() for site in changed)
    for site in done.base:
        torch.testing.assert_close(sum_[site], expected[site], **CLOSE)
    for site in adapter:
        chunks = torch.cat([by_rows.rows(site, slice(0, 5)), by_rows.rows(site, slice(5, None))])
        torch.testing.assert_close(chunks, adapter[site], **CLOSE)
    assert adapter.notes == []
    held = set(adapter.factored())
    for site in set(adapter) - held:
        with pytest.raises(ValueError, match=f"{site} is no product of factors"):
            adapter.factors(site)
    dense = {"saved": 9, "bias-all": 9, "bias-lora": 6, "lora-bias": 3, "embeddings-dora": 4}
    assert len(set(adapter) - held) == dense.get(what, 0)


def test_learned_positions_and_both_kinds_of_matrix(train: Train) -> None:
    done = train("gpt2", tied=False, target_modules=["wte", "wpe", "c_attn", "c_proj"])
    sum_, expected = done.base + done.adapter(), of_module(done.merged, done.base)
    assert {"embed", "position"} <= set(map(str, done.adapter()))
    for site in done.base:
        torch.testing.assert_close(sum_[site], expected[site], **CLOSE)


# --- ties ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_ties_are_merged_as_peft_does_and_it_is_said(train: Train, targets: list[str]) -> None:
    done = train("llama", tied=True, target_modules=[*targets, "q_proj"])
    adapter = done.adapter()
    torch.testing.assert_close((done.base + adapter)["embed"], of_module(done.merged, done.base)["embed"], **CLOSE)
    (note,) = adapter.notes
    assert "in both" in note
    assert all(target in note for target in targets)


def test_an_adapter_tied_like_its_model_counts_once(train: Train, tmp_path: Path) -> None:
    done = train("llama", tied=True, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = done.adapter()
    assert adapter.notes == []
    written = write(done.base + adapter, tmp_path / "merged")
    torch.testing.assert_close(logits_of(load_module(written.folder, "auto")), done.logits, rtol=1e-4, atol=1e-3)
    twice = of_module(done.merged, done.base)["embed"] - done.base["embed"]
    torch.testing.assert_close(2 * adapter["embed"], twice, **CLOSE)


def test_what_a_tied_model_cannot_hold(train: Train, tmp_path: Path) -> None:
    done = train("llama", tied=True, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"embed_tokens.* alone, .*Untie"):
        done.adapter()
    done = train("llama", tied=True, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(CheckpointError, match=r"trains embed twice.*Untie"):
        done.adapter()
    for left in ("embed_tokens", "lm_head"):  # one of the two as it was is another head all the same

        def as_it_was(tensors: dict[str, torch.Tensor], left: str = left) -> dict[str, torch.Tensor]:
            return {k: done.base["embed"] if f"{left}.weight" in k else v for k, v in tensors.items()}

        with pytest.raises(CheckpointError, match=r"trains embed twice.*Untie"):
            Adapter(with_tensors(done.folder, tmp_path / left, as_it_was), done.base)


# --- names and damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model."),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
        ("base_model.model.model.", "base_model.model._orig_mod.model."),
        (".weight", ".default.weight"),
    ],
    ids=str,
)
def test_names_as_tools_write_them(train: Train, old: str, new: str, tmp_path: Path) -> None:
    done = train("llama")
    renamed = with_tensors(
        done.folder, tmp_path / "renamed", lambda ts: {k.replace(old, new): v for k, v in ts.items()}
    )
    assert_same(Adapter(renamed, done.base), done.adapter())


def test_a_bare_backbone_has_the_same_sites(train: Train, tmp_path: Path) -> None:
    done = train("llama")
    bare = tmp_path / "bare"
    shutil.copytree(done.base.folder, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, bare / "model.safetensors")
    assert_same(Adapter(done.folder, Checkpoint(bare)), done.adapter())


def assert_same(a: Adapter, b: Adapter) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[s], b[s]) for s in a)


def test_an_adapter_of_another_model(train: Train, bases: Callable[[str, bool], Path]) -> None:
    done = train("llama")
    with pytest.raises(
        CheckpointError, match=r"21 of its modules or tensors are not in .*gpt2.*: base_model\.model\.model\.layers\.0"
    ):
        Adapter(done.folder, Checkpoint(bases("gpt2", True)))
    with pytest.raises(CheckpointError, match=r"6 of its modules or tensors are not in .*olmo2|must be"):
        Adapter(train("phi3").folder, Checkpoint(bases("olmo2", True)))


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def reshape(
    part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: change(v) if part in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("1.mlp.down_proj.lora_B"), r"layers\.1\.mlp\.down_proj has lora_A; lora_A and lora_B belong together"),
        (reshape("2.self_attn.q_proj.lora_A", lambda t: t[:, 1:]), r"lora_A of .*2\.self_attn\.q_proj is \(3, 31\) but must be \(3, 32\)"),
        (reshape("2.self_attn.q_proj.lora_B", lambda t: t[1:]), r"lora_B of .*2\.self_attn\.q_proj is \(47, 3\) but must be \(48, 3\)"),
        (reshape("lora_", lambda t: t[:2] if t.shape[0] == 3 else t[:, :2]), r"lora_A of .* is \(2, .*the config says rank 3"),
        (reshape("0.mlp.up_proj.lora_A", lambda t: t.to(torch.int32)), r"lora_A\.weight is torch\.int32"),
        (reshape("0.mlp.up_proj.lora_A", lambda t: t[0]), r"lora_A of .* is \(32,\)"),
        (lambda ts: {**ts, "base_model.model.model.layers.9.mlp.up_proj.weight": torch.ones(2)}, r"1 of its modules.*layers\.9"),
        (lambda ts: {**ts, "base_model.model.model.norm.weight": torch.ones(2)}, r"norm\.weight is \(2,\), which does not fit"),
        (lambda ts: {**ts, **{k.replace("lora_A.", "lora_A.other."): v + 0 for k, v in ts.items()}}, "two adapters"),
        (lambda ts: {**ts, **{k.replace("lora_A.weight", "lora_magnitude_vector"): v[0] + 0 for k, v in ts.items() if "lora_A" in k}}, "magnitude"),
        (lambda _: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_damaged_tensors(train: Train, damage: Any, said: str, tmp_path: Path) -> None:
    done = train("llama")
    with pytest.raises(CheckpointError, match=said) as error:
        Adapter(with_tensors(done.folder, tmp_path / "damaged", damage), done.base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, r"is an adapter of type 'LOHA', and only LoRA .*merge_and_unload"),
        ({"alora_invocation_tokens": [1, 2]}, r"sets alora_invocation_tokens, .*merge_and_unload"),
        ({"target_parameters": ["mlp.experts"]}, "sets target_parameters"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"a_variant_of_tomorrow": True}, "sets a_variant_of_tomorrow"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"began with pissa_niter_4, .*path_initial_model_for_weight_conversion",
        ),
        ({"use_dora": True}, "use_dora True, but .* has no magnitude"),
        ({"r": 0}, "rank of .* is 0, not a whole number from 1"),
        ({"r": "3"}, "rank of .* is '3'"),
        ({"r": 4}, r"is \(3, 40\) but must be \(4, 40\)"),
        ({"lora_alpha": float("inf")}, "alpha of .* is inf"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha of .*q_proj is None"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], not a mapping"),
        ({"rank_pattern": {"q_proj(": 3}}, "a pattern of its ranks or alphas is malformed"),
    ],
    ids=str,
)
def test_configs_that_mean_something_else(train: Train, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    done = train("llama")
    with pytest.raises(CheckpointError, match=said):
        Adapter(edited_config(done.folder, tmp_path / "other", **changes), done.base)


def test_folders_that_hold_no_adapter(train: Train, tmp_path: Path) -> None:
    done = train("llama")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        Adapter(done.base.folder, done.base)
    (tmp_path / "x").mkdir()
    for text in ("", "{", "[]", "[" * 100_000, '"LORA"', "\xff"):
        (tmp_path / "x" / CONFIG).write_text(text, encoding="latin-1")
        shutil.copy(done.folder / WEIGHTS, tmp_path / "x" / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"is not JSON|only LoRA"):
            Adapter(tmp_path / "x", done.base)
    shutil.copy(done.folder / CONFIG, tmp_path / "x" / CONFIG)
    (tmp_path / "x" / WEIGHTS).rename(tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"a pickle \(adapter_model\.bin\), which can run code when opened and is refused.*save_pretrained",
    ):
        Adapter(tmp_path / "x", done.base)


# --- factors ------------------------------------------------------------------------------------------------------------------


def test_factored_by_hand() -> None:
    site = Site.parse("0.mlp.up")
    left, right = torch.randn(6, 2), torch.randn(2, 5)
    delta = Factored({site: (left, right)})
    assert torch.equal(delta[site], left @ right)
    assert torch.equal(delta.rows(site, slice(1, 3)), left[1:3] @ right)
    assert delta.shape(site) == (6, 5)
    assert delta.rank(site) == 2
    assert delta.factored() == [site]
    with pytest.raises(ValueError, match=r"factors at 0\.mlp\.up are \(6, 2\) and \(3, 5\)"):
        Factored({site: (left, torch.randn(3, 5))})
    with pytest.raises(ValueError, match="matches no site"):
        delta.factors("1.mlp.up")


def test_joined_is_the_sum(train: Train) -> None:
    a, b = train("llama"), train("llama", r=2, target_modules=["q_proj", "up_proj"])
    sum_ = 0.8 * a.adapter() - 0.3 * b.adapter()
    one = joined(sum_)
    assert set(one) == set(sum_)
    for site in sum_:
        torch.testing.assert_close(one[site], sum_[site], **CLOSE)
        assert one.rank(site) == (5 if site.part in ("attn.q", "mlp.up") else 3)
    with pytest.raises(ValueError, match=r"is not held as factors at .*Use truncated"):
        joined(a.adapter() + (apply(Scale(2.0), a.base, "0.attn.q") - a.base))


def test_truncated_is_the_best(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = Checkpoint(bases("qwen2", False))
    tuned = Checkpoint(save_tiny("qwen2", tmp_path / "tuned", tied=False, seed=1))
    delta = (tuned - base).keep(["*.attn.q", "*.attn.q.bias", "0.mlp.down", "norm"])
    short, errors = truncated(delta, 4)
    assert set(errors) == set(delta)
    for site in delta:
        if len(delta.shape(site)) == 1:
            assert errors[site] == 1.0
            assert site not in short
            continue
        assert short.rank(site) == 4
        spectrum = torch.linalg.svdvals(
            delta[site].double()
        )  # Eckart and Young: what is lost is the rest of the spectrum
        best = float(spectrum[4:].square().sum().sqrt() / spectrum.norm())
        assert errors[site] == pytest.approx(best, rel=1e-5)
        assert errors[site] == pytest.approx(float((delta[site] - short[site]).norm() / delta[site].norm()), rel=1e-5)
    whole, none = truncated(delta.keep("0.mlp.down"), 999)
    assert whole.rank("0.mlp.down") == 32
    assert none[Site.parse("0.mlp.down")] < 1e-6
    torch.testing.assert_close(whole["0.mlp.down"], delta["0.mlp.down"], **CLOSE)
    still, zero = truncated(delta.keep("*.attn.q") + 0.0 * delta.keep(["0.mlp.down", "norm"]), 2)
    for site in ("0.mlp.down", "norm"):
        assert site not in still
        assert zero[Site.parse(site)] == 0
    with pytest.raises(ValueError, match="a rank is 1 or more"):
        truncated(delta, 0)
    with pytest.raises(ValueError, match=r"changes no matrix \(norm\)"):
        truncated(delta.keep("norm"), 3)


def test_factor_pair_of_what_has_that_rank() -> None:
    W = torch.randn(40, 3) @ torch.randn(3, 300)
    left, right, error = factor_pair(W, 3)
    assert left.shape == (40, 3)
    assert right.shape == (3, 300)
    assert error < 1e-6
    torch.testing.assert_close(left @ right, W, rtol=1e-5, atol=1e-5)
    assert factor_pair(W, 2)[2] > 0.01


# --- adapters we write --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_written(family: str, bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = Checkpoint(bases(family, False))
    tuned = Checkpoint(save_tiny(family, tmp_path / "tuned", tied=False, seed=1))
    delta = 0.1 * (tuned - base)
    short, _ = truncated(delta.keep(["*.attn.[qkvo]", "1.mlp.up", "2.mlp.[gu]*", "1.mlp.down", "embed", "head"]), 4)
    folder = save_adapter(short, tmp_path / "adapter", base)
    written = write(base + short, tmp_path / "model")
    expected = logits_of(load_module(written.folder, "auto"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing or unexpected tensors
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|tied|embedding).*")
        loaded = PeftModel.from_pretrained(load_module(base.folder, "auto"), folder)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-3)
    merged = of_module(loaded.merge_and_unload(), base)
    for site in base:
        torch.testing.assert_close(merged[site], (base + short)[site], **CLOSE)
    again = Adapter(folder, base)
    for site in short:
        torch.testing.assert_close(again[site], short[site], **CLOSE)
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in (CONFIG, WEIGHTS))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt-neox"])
def test_an_adapter_survives_being_written_again(train: Train, family: str, tmp_path: Path) -> None:
    done = train(family, **VARIANTS["patterns"])
    again = Adapter(save_adapter(done.adapter(), tmp_path / "again", done.base), done.base)
    assert list(again) == list(done.adapter())
    for site in again:
        assert again.rank(site) == done.adapter().rank(site)  # what shares a module shares its right factor
        torch.testing.assert_close(again[site], done.adapter()[site], **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_lora_can_hold(bases: Callable[[str, bool], Path], tied: bool) -> None:
    base = Checkpoint(bases("gpt2", tied))
    matrices = [s for s in base if len(base.shape(s)) == 2]
    assert lora_sites(base) == [s for s in matrices if str(s) != "embed" or not tied]
    assert {"position", "0.attn.q"} <= set(map(str, lora_sites(base)))


def test_adapters_that_cannot_be_written(train: Train, bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = Checkpoint(bases("llama", True))
    done = train("llama", target_modules=["q_proj"], modules_to_save=["norm"])
    before = sorted(p.name for p in tmp_path.iterdir())
    pair = torch.ones(100, 1), torch.ones(1, 32)
    for delta, said in (
        (done.adapter(), r"norm are not held as factors"),
        (Factored({Site.parse("embed"): pair}), r"can hold embed \(embed is tied, .*Leave them out"),
        (Factored({Site.parse("0.mlp.up"): pair}), r"has no site of the same shape for 0\.mlp\.up"),
        (Factored({Site.parse("7.mlp.up"): pair}), r"has no site of the same shape for 7\.mlp\.up"),
        (Factored({}), "no change to save"),
    ):
        with pytest.raises(ValueError, match=said):
            save_adapter(delta, tmp_path / "x", base)
    with pytest.raises(FileExistsError):
        save_adapter(train("llama").adapter(), done.folder, base)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("adapter-")) == [
        name for name in before if not name.startswith("adapter-")
    ]


def test_a_write_that_fails_leaves_nothing(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery import lowrank

    adapter, base = train("llama").adapter(), train("llama").base
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        lowrank, "_adapter_tensors", lambda module, loras: {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}
    )
    with pytest.raises(CheckpointError, match="PEFT would not load this adapter"):
        save_adapter(adapter, tmp_path / "x", base)
    assert sorted(tmp_path.iterdir()) == before


def test_factors_that_are_not_finite_are_not_saved(train: Train, tmp_path: Path) -> None:
    base = train("llama").base
    site = Site.parse("0.attn.o")
    for bad in (float("nan"), float("inf")):
        pair = torch.full((base.shape(site)[0], 2), bad), torch.ones(2, base.shape(site)[1])
        with pytest.raises(ValueError, match=r"0\.attn\.o holds values that are NaN or infinite; nothing was written"):
            save_adapter(Factored({site: pair}), tmp_path / "x", base)
    assert not (tmp_path / "x").exists()


def test_models_have_no_factors(train: Train, unchecked: None) -> None:
    base = train("llama").base
    for call in (lambda: truncated(base, 2), lambda: joined(base), lambda: land(base, base)):
        with pytest.raises(TypeError, match="a change is wanted, and this is a model"):
            call()


@pytest.mark.parametrize("rank", [2.5, True, "2"])
def test_a_rank_is_a_whole_number(rank: Any, train: Train, unchecked: None) -> None:
    change = train("llama").adapter()
    with pytest.raises(ValueError, match=r"rank=.*: give a whole number"):
        truncated(change, rank)

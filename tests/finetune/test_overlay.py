"""Laws of the sparse overlay: it is a masked dense change, to the number and in its gradients; the base keeps its bytes; all is given back."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import overlay as overlays
from finetune.lift import LIFT, budget, principal_indices
from finetune.overlay import overlay_, sparse_product
from surgery.delta import StoredDelta, save_delta
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import tiny

FUSED = ["llama", "gpt2", "phi3", "gpt-neox"]  # plain; [in, out] and fused; fused by rows; fused head by head
IDS = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(5))


class RowInt8(nn.Module):
    """A linear map stored as one byte an entry, with a scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, read(self).to(x.dtype), self.bias)


def read(module: Any) -> Tensor:
    return module.codes.float() * module.scale


def model(family: str = "llama", quantised: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    found = Model(*tiny(family, dtype=dtype))
    if quantised:
        for name, part in list(found.module.named_modules()):
            if isinstance(part, nn.Linear) and "layers" in name:
                found.module.set_submodule(name, RowInt8(part))
    return found


def logits(m: Model) -> Tensor:
    return m.module(input_ids=IDS).logits


def stir(parameters: list[nn.Parameter], size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in parameters:
            values.normal_(0, size, generator=generator)


def loss(m: Model) -> Tensor:
    return torch.nn.functional.cross_entropy(logits(m)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


# --- the product --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [1, 20, 1 << 22])
def test_product_and_gradients_are_the_dense_ones(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "_STRIP", strip)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    where = torch.tensor([0, 6, 7, 20, 41, 62])
    values = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(63, dtype=torch.float64).index_put((where,), values).view(9, 7)
    torch.testing.assert_close(sparse_product(x, values, where, 9), x @ dense.T, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, values: sparse_product(x, values, where, 9), (x, values))
    assert torch.autograd.gradcheck(lambda values: sparse_product(x.detach(), values, where, 9), (values,))
    narrow = [t.detach().float().requires_grad_() for t in (x, values)]
    with torch.autocast("cpu", torch.bfloat16):  # the precision of x, there and back
        slopes = torch.autograd.grad(sparse_product(narrow[0], narrow[1], where, 9).square().sum(), narrow)
    for found, exact in zip(slopes, torch.autograd.grad((x @ dense.T).square().sum(), (x, values)), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_product_of_no_entries_is_zero() -> None:
    x, values = torch.randn(4, 7), torch.zeros(0, requires_grad=True)
    product = sparse_product(x, values, torch.zeros(0, dtype=torch.int32), 9)
    assert torch.equal(product, torch.zeros(4, 9))
    product.sum().backward()
    assert values.grad is not None


# --- a masked dense change ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED)
def test_positions_are_those_of_the_site_and_zero_changes_nothing(family: str) -> None:
    m = model(family)
    before = logits(m)
    with overlay_(m, density=0.1, filter_rank=4) as overlay:
        assert torch.equal(logits(m), before)
        stir(overlay.parameters())
        delta = overlay.delta()
        assert set(overlay.sites) == set(linear_sites(m.weights)) == set(delta)
        for site in delta:
            W = m.weights[site]
            count = budget(W.shape, density=0.1)
            moved = delta[site].flatten().nonzero().squeeze(1)
            assert torch.equal(moved, principal_indices(W.contiguous(), 4, count).long()), site
        assert overlay.trainable == sum(budget(m.weights[s].shape, density=0.1) for s in delta)


@pytest.mark.parametrize("family", FUSED)
def test_logits_are_those_of_base_plus_delta(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "_STRIP", 200)  # several strips, as a large matrix has
    m, plain = model(family), model(family)
    before = logits(m)
    overlay = overlay_(m, ["*.attn.*", "1.mlp.down"], lora_rank=1)
    assert len(overlay.sites) == 3 * 4 + 1
    stir(overlay.parameters())
    with plain.installed(plain.weights + overlay.delta()):
        expected = logits(plain)
    assert (expected - before).abs().max() > 1
    torch.testing.assert_close(logits(m), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True])
def test_gradients_are_the_chosen_entries_of_the_dense_ones(quantised: bool) -> None:
    m = model(quantised=quantised)
    dense = model()
    if quantised:  # the dense twin has what the codes stand for
        with torch.no_grad():
            for name, part in m.module.named_modules():
                if isinstance(part, RowInt8):
                    dense.module.get_submodule(name).weight.copy_(read(part))
    overlay = overlay_(m, density=0.1, dequantise=read if quantised else None)
    loss(m).backward()
    loss(dense).backward()
    for name, values in overlay.named_parameters():
        path = name.removesuffix(".overlay")
        full = dense.module.get_submodule(path).weight.grad.flatten()
        expected = full[m.module.get_submodule(path).overlay_at.long()]
        assert values.grad is not None
        torch.testing.assert_close(values.grad, expected, rtol=1e-3, atol=1e-4 * float(full.abs().max()))
    moving = {name for name, p in m.module.named_parameters() if p.grad is not None}
    assert moving == {name for name, _ in overlay.named_parameters()}


def test_training_is_lifts_with_a_frozen_mask() -> None:
    ours, theirs = model(), model()
    overlay = overlay_(ours, density=0.1, filter_rank=4)
    sites = linear_sites(theirs.weights)
    lift = LIFT([(str(s), theirs.weights.parameter(s)) for s in sites], lr=1e-3, density=0.1, filter_rank=4)
    adamw = torch.optim.AdamW(overlay.parameters(), lr=1e-3, weight_decay=0.0)
    start = {s: theirs.weights[s].clone() for s in sites}
    losses = []
    for _ in range(5):
        for m, optimizer in ((ours, adamw), (theirs, lift)):
            value = loss(m)
            value.backward()
            losses.append(float(value.detach()))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-5, atol=0)
    delta = overlay.delta()
    for s in sites:
        torch.testing.assert_close(delta[s], theirs.weights[s] - start[s], rtol=0, atol=2e-5)


def test_a_quantised_base_keeps_its_bytes_while_the_loss_falls() -> None:
    m = model(quantised=True)
    before = {name: tensor.clone() for name, tensor in m.module.state_dict().items()}
    overlay = overlay_(m, density=0.1, dequantise=read)
    adamw = torch.optim.AdamW(overlay.parameters(), lr=1e-2)
    values = []
    for _ in range(6):
        values.append(loss(m))
        values[-1].backward()
        adamw.step()
        adamw.zero_grad()
    assert values[-1] < 0.8 * values[0]
    assert sum(s.numel() for state in adamw.state.values() for s in state.values() if s.ndim) == 2 * overlay.trainable
    after = m.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_low_precision(dtype: torch.dtype) -> None:
    m = model(dtype=dtype)
    overlay = overlay_(m, density=0.1)
    assert {p.dtype for p in overlay.parameters()} == {torch.float32}
    stir(overlay.parameters(), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss(m).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in overlay.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        m = model()
        overlay = overlay_(m, density=0.1)
        stir(overlay.parameters())
        if checkpointing:
            m.module.train()
            m.module.gradient_checkpointing_enable({"use_reentrant": False})
        loss(m).backward()
        grads.append([p.grad for p in overlay.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_every_option_changes_the_positions() -> None:
    def places(**options: Any) -> list[list[int]]:
        m = model()
        with overlay_(m, **({"density": 0.1} | options)) as overlay:
            return [
                m.module.get_submodule(n.removesuffix(".overlay")).overlay_at.tolist()
                for n, _ in overlay.named_parameters()
            ]

    options: list[dict[str, Any]] = [
        {}, {"density": 0.2}, {"density": None, "lora_rank": 2}, {"filter_rank": 2}, {"select": "smallest"}, {"select": "random"},
        {"select": "random", "seed": 1}, {"at": "*.mlp.*"},
    ]  # fmt: skip
    found = [places(**o) for o in options]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert places(select="random") == found[5]
    with overlay_(model("phi3"), density=0.1, select="random") as overlay:  # one module, three draws
        stir(overlay.parameters())
        k, v = (overlay.delta()[f"0.attn.{part}"] for part in "kv")
    assert not torch.equal(k != 0, v != 0)


# --- what becomes of it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED)
def test_delta_goes_to_a_file_and_back_sparse(family: str, tmp_path: Path) -> None:
    m = model(family)
    overlay = overlay_(m, density=0.1)
    stir(overlay.parameters())
    delta = overlay.delta()
    stored = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash="x"))
    assert stored.nonzero == overlay.trainable
    for site in delta:
        assert stored.form(site) == "sparse"
        assert torch.equal(stored[site], delta[site])
        assert torch.equal(delta.rows(site, slice(3, 8)), delta[site][3:8])
    stir(overlay.parameters(), 7.0)
    assert torch.equal(stored[site], delta[site])  # it is as it was when asked for


@pytest.mark.parametrize(("family", "dtype"), [*((f, torch.float32) for f in FUSED), ("llama", torch.bfloat16)])
def test_merging_is_adding_the_delta(family: str, dtype: torch.dtype) -> None:
    m, plain = model(family, dtype=dtype), model(family, dtype=dtype)
    overlay = overlay_(m, density=0.1)
    stir(overlay.parameters())
    change = overlay.delta()
    expected = plain.weights + change
    overlay.merge_()
    for site in m.weights:
        whole = plain.weights[site].double() + change[site].double() if site in change else plain.weights[site]
        assert torch.equal(m.weights[site], whole.to(dtype)), site
    assert not overlay.parameters()
    with plain.installed(expected):
        assert torch.equal(logits(m), logits(plain))


def test_merging_into_a_quantised_base_is_refused_and_changes_nothing() -> None:
    m = model(quantised=True)
    overlay = overlay_(m, density=0.1, dequantise=read)
    stir(overlay.parameters())
    before = logits(m)
    with pytest.raises(ValueError, match=r"k_proj is quantised.*overlay.delta"):
        overlay.merge_()
    assert torch.equal(logits(m), before)


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_borrowed_is_given_back(failing: bool) -> None:
    m = model()
    next(m.module.parameters()).requires_grad_(False)

    def belongings() -> list[Any]:
        return [
            [(n, id(p), p.requires_grad) for n, p in m.module.named_parameters()],
            [n for n, _ in m.module.named_buffers()],
            [(n, len(part._forward_hooks), sorted(part.__dict__)) for n, part in m.module.named_modules()],
            logits(m).tolist(),
        ]

    before = belongings()
    with suppress(KeyboardInterrupt), overlay_(m, density=0.1) as overlay:
        stir(overlay.parameters())
        assert belongings() != before
        if failing:
            raise KeyboardInterrupt
    assert belongings() == before
    overlay.close()  # again: nothing


def test_a_plain_trainer_trains_and_resumes_it(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(4, 1)])

    def train(folder: Path, steps: int, resume: bool = False) -> tuple[Model, Any]:
        m = model()
        overlay = overlay_(m, density=0.1)
        arguments = TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant", dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(m.module, arguments, train_dataset=rows)
        if steps < 4:
            trainer.add_callback(_stop_at(steps))
        trainer.train(resume_from_checkpoint=resume)
        return m, overlay

    whole, overlay = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    _, resumed = train(tmp_path / "b", 4, resume=True)
    start = model()
    assert all(torch.equal(whole.weights[s], start.weights[s]) for s in start.weights)
    for mine, theirs in zip(overlay.parameters(), resumed.parameters(), strict=True):
        assert mine.any()
        assert torch.equal(mine, theirs)


def _stop_at(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


# --- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "*.attn.qkv", "density": 0.1}, "matches no site"),
        ({"at": "embed", "density": 0.1}, "matches no site"),
        ({"at": "*.attn.o.h1", "density": 0.1}, r"o.h1 is one head"),
        ({}, "exactly one"),
        ({"density": 0.1, "lora_rank": 1}, "exactly one"),
        ({"density": 1.5}, "fraction"),
        ({"density": 0.1, "filter_rank": 0}, "rank"),
        ({"density": 0.1, "select": "lift_sparse"}, "select"),
        (
            {"density": 0.1, "dequantise": lambda module: module.weight.to(torch.int8)},
            r"dequantise gave torch.int8.*k_proj",
        ),
        ({"density": 0.1, "dequantise": lambda module: module.weight / 0}, r"0.attn.k.*NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_leave_the_model_alone(options: dict[str, Any], message: str, unchecked: None) -> None:
    m = model()
    names = [(n, p.requires_grad) for n, p in m.module.named_parameters()]
    with pytest.raises(ValueError, match=message):
        overlay_(m, **options)
    assert [(n, p.requires_grad) for n, p in m.module.named_parameters()] == names


def test_a_quantised_base_without_a_reader_is_refused() -> None:
    m = model(quantised=True)
    with pytest.raises(ValueError, match=r"k_proj is a RowInt8 without a weight.*dequantise"):
        overlay_(m, density=0.1)
    m = model()
    layer = m.module.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj is a Linear stored as torch.int8.*dequantise"):
        overlay_(m, density=0.1)


def test_two_overlays_on_one_matrix_and_packed_experts_are_refused() -> None:
    m = model()
    overlay_(m, "0.mlp.up", density=0.1)
    with pytest.raises(ValueError, match=r"up_proj has an overlay already"):
        overlay_(m, "*.mlp.*", density=0.1)
    overlay_(m, "*.mlp.down", density=0.1)  # beside it, there is room
    experts = model("mixtral")
    if any(place.expert is not None for place in experts.anatomy.places.values()):
        with pytest.raises(ValueError, match=r"one tensor with all experts"):
            overlay_(experts, density=0.1)

"""Laws of the SHiRA arm: PEFT's adapter trains as many entries of each matrix as a LoRA has numbers, as AdamW on those entries would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.tasks import chained_sums
from finetune.grpo import grpo
from finetune.learner import with_adapter
from finetune.monitors import every
from finetune.objectives import nll
from finetune.predictions import predict
from finetune.tune import Tuned, tune
from surgery.model import Model
from surgery.transcript import Transcript
from surgery.weights import linear_sites
from tests.families import tiny
from tests.finetune.test_tune import batch

SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "autocast": False, "lr": 1e-2, "schedule": "constant"}


def model(family: str = "llama", **options: Any) -> Model:
    return Model(*tiny(family, **options))


def taught(m: Model, count: int = 4) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in chained_sums(16, seed=3, terms=(2, 3))[:count]]


def run(m: Model, **options: Any) -> Tuned:
    return tune(m, taught(m), method="shira", **(SMALL | {"lora_rank": 2} | options))


def tensors(m: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def test_it_is_adamw_on_the_entries_that_peft_draws() -> None:
    trained, plain = model(), model()
    done = run(trained, seed=5, max_grad_norm=0.5)
    drawn = {
        name.removeprefix("base_model.model."): layer.shira_indices["default"].long()
        for name, layer in with_adapter(model(), "shira", 2, seed=5).named_modules()
        if hasattr(layer, "shira_indices")
    }
    owned = {name: plain.module.get_submodule(name).weight for name in drawn}
    beside = [
        layer.scaling["default"] for layer in with_adapter(model(), "lora", 3).modules() if hasattr(layer, "lora_A")
    ]
    assert set(beside) == {2.0}  # of a LoRA: alpha is twice its rank
    plain.module.requires_grad_(False)
    numbers = {name: torch.nn.Parameter(torch.zeros(index.shape[1])) for name, index in drawn.items()}
    adamw = torch.optim.AdamW(numbers.values(), lr=1e-2, weight_decay=0.0)
    losses, start = [], {name: weight.detach().clone() for name, weight in owned.items()}
    for weight in owned.values():
        weight.requires_grad_(True)
    for _ in range(3):
        loss = nll(predict(plain.module, batch(plain)))
        losses.append(float(loss.detach()))
        loss.backward()
        for name, weight in owned.items():
            numbers[name].grad, weight.grad = weight.grad[tuple(drawn[name])], None
        torch.nn.utils.clip_grad_norm_(numbers.values(), 0.5)
        adamw.step()
        with torch.no_grad():
            for name, weight in owned.items():
                weight.copy_(start[name]).index_put_(tuple(drawn[name]), numbers[name], accumulate=True)
    assert done.losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in tensors(trained).items():
        torch.testing.assert_close(tensor, tensors(plain)[name], rtol=0, atol=2e-5)
    assert done.trainable == sum(len(n) for n in numbers.values())


def test_as_many_entries_move_as_a_lora_has_numbers_and_no_others() -> None:
    m = model()
    start = {site: m.weights[site].clone() for site in m.weights}
    done = run(m)
    counts = {site: 2 * sum(m.weights.shape(site)) for site in linear_sites(m.weights)}
    for site, before in start.items():
        moved = int((m.weights[site].view(torch.int32) != before.view(torch.int32)).sum())
        assert moved <= counts.get(site, 0)
        assert moved > 0.8 * counts.get(site, 0) or site not in counts
    assert (
        done.trainable
        == sum(counts.values())
        == tune(model(), taught(m), method="lora", **SMALL | {"lora_rank": 2}).trainable
    )
    assert done.losses[-1] < done.losses[0]
    # in place, without a trace of the adapter, and drawn by the seed
    assert tensors(m).keys() == tensors(model()).keys()
    assert all(type(part).__module__.split(".")[0] != "peft" for part in m.module.modules())
    other = model()
    run(other, seed=1)
    site = linear_sites(m.weights)[0]
    places = [(found.weights[site] != start[site]) for found in (m, other)]
    assert not torch.equal(*places)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def stop(model: Model, step: int) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    whole, broken, resumed = model(), model(), model()
    done = run(whole, steps=4)
    saving: dict[str, Any] = {"steps": 4, "checkpoints": tmp_path, "save_every": 2}
    start = tensors(broken)
    with pytest.raises(KeyboardInterrupt):
        run(broken, watch=[every(1, stop)], log=tmp_path / "log.jsonl", **saving)
    assert all(torch.equal(p, start[name]) for name, p in broken.module.named_parameters())  # the adapter is gone
    again = run(resumed, **saving)
    assert again.losses == done.losses
    assert all(torch.equal(p, tensors(whole)[name]) for name, p in resumed.module.named_parameters())


def test_the_start_is_the_model_without_its_adapter() -> None:
    m = model()
    told = taught(m)
    with torch.no_grad():
        start = float(nll(predict(m.module, batch(m))))
    seen: list[float] = []

    def watched(p: Any) -> torch.Tensor:
        seen.append(float(torch.nn.functional.cross_entropy(p.reference(), p.targets)))
        return nll(p)

    watched.reference = True  # type: ignore[attr-defined]
    tune(m, told, method="shira", objective=watched, **SMALL | {"lora_rank": 2})
    assert seen == [pytest.approx(start, rel=1e-4)] * 3
    m = model()
    done = grpo(
        m, [t.question for t in told], lambda _, t: float(sum(t.ids) % 7), trains="shira", lora_rank=2, steps=2, groups=2, samples=2,
        max_new_tokens=4, beta=1e-3, lr=1e-2, autocast=False,
    )  # fmt: skip
    assert done.rounds[0].kl == pytest.approx(0, abs=1e-6)
    assert done.rounds[1].kl > 0


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"density": 0.1, "lora_rank": None}, "leave out density. Its budget is lora_rank"),
        ("llama", {"refresh": 2}, "leave out refresh"),
        ("llama", {"lora_rank": 0}, "lora_rank must be at least 1"),
        ("llama", {"lora_rank": None}, r"SHiRA of rank 16 has \d+ entries of each .*Give lora_rank of at most \d+"),
        ("gpt2", {}, "SHiRA adapts linear layers alone; .* is a Conv1D"),
    ],
    ids=["density", "lift's", "zero", "too many", "no linear layer"],
)
def test_what_it_has_not_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    m = model(family)
    before = tensors(m)
    with pytest.raises(ValueError, match=message):
        run(m, **options)
    assert all(torch.equal(p, before[name]) for name, p in m.module.named_parameters())
    coarse = model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="shira tuning needs fp32"):
        run(coarse)

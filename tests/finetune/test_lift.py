import copy
import gc
import io

import pytest
import torch
from torch import Tensor, nn

from finetune.lift import LIFT, budget, principal_indices
from tests.oracles.lift import DenseLIFT, mask, released_mask

SHAPES = [(24, 16), (16, 40), (17, 17), (9, 33)]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(out: int, into: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    """A random matrix; decay > 0 gives it a spectrum that falls by that exponent, 0 leaves it flat."""
    W = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    if decay:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * S * torch.arange(1, len(S) + 1) ** -decay) @ Vh
    return W


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(matrix(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    return [matrix(*shape, seed=1000 * step + i) for i, shape in enumerate(SHAPES)]


def backward(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """A real backward pass whose gradient of each parameter is the given one."""
    torch.stack([(p * g.to(p.dtype)).sum().float() for p, g in zip(params, grads, strict=True)]).sum().backward()


def train(optimizer: LIFT, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        backward(params, gradients(step))
        optimizer.step()
        optimizer.zero_grad()


def dense(params: list[nn.Parameter], optimizer: LIFT, key: str) -> list[Tensor]:
    return [
        torch.zeros(p.numel()).index_copy(0, optimizer.state[p]["indices"].long(), optimizer.state[p][key].float())
        for p in params
    ]


# principal_indices


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 100), (64, 192), (192, 64), (576, 192), (130, 1100)])
def test_indices_are_the_full_svds(shape, decay):
    W = matrix(*shape, seed=3, decay=decay).bfloat16()
    count = budget(shape, density=0.05)
    found = principal_indices(W, 4, count)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), mask(W, 4, count).flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("shape", [(300, 100), (64, 192)])
def test_smallest_is_what_the_released_code_trains(shape):
    W, count = matrix(*shape), budget(shape, density=0.05)
    assert torch.equal(
        principal_indices(W, 4, count, "smallest").long(), released_mask(W, 4, count).flatten().nonzero().squeeze(1)
    )


def test_selections_differ_and_count():
    W, count = matrix(300, 100), 1500
    found = {s: principal_indices(W, 8, count, s) for s in ("largest", "smallest", "random", "magnitude")}
    found["another seed"] = principal_indices(W, 8, count, "random", seed=1)
    found["another rank"] = principal_indices(W, 9, count)
    sets = {name: frozenset(indices.tolist()) for name, indices in found.items()}
    assert len(set(sets.values())) == len(sets)
    for name, indices in found.items():
        assert len(sets[name]) == count
        assert (indices.diff() > 0).all()
    assert not sets["largest"] & sets["smallest"]
    assert torch.equal(principal_indices(W, 8, count, "random", seed=1), found["another seed"])
    by_size = W.abs().flatten().argsort(descending=True)[:count].sort().values
    assert torch.equal(found["magnitude"].long(), by_size)
    assert torch.equal(principal_indices(W, 100, count), found["magnitude"])  # a full-rank filter filters nothing


def test_ties_go_to_the_lowest_positions():
    W = torch.zeros(200, 300)
    W[50:, 7] = 1
    W[60, 7] = 2
    assert principal_indices(W, 1, 5, "magnitude").tolist() == [i * 300 + 7 for i in (50, 51, 52, 53, 60)]
    assert principal_indices(torch.ones(100, 300), 1, 12, "magnitude").tolist() == list(range(12))
    V = torch.zeros(200, 300)
    V[:, 7] = 1
    assert principal_indices(V, 1, 300, "smallest").tolist() == [i for i in range(301) if i != 7]


def test_ordering_survives_a_misleading_sample():
    spread = torch.rand(400, 400) * 0.1
    spread[:: 400 * 400 // 32768] += 1  # exactly the sampled rows are large
    for count in (1, 100, 60_000, 159_999, 160_000):
        expected = spread.flatten().argsort(descending=True, stable=True)[:count].sort().values
        assert torch.equal(principal_indices(spread, 1, count, "magnitude").long(), expected)


def test_choosing_leaves_the_weights_alone():
    for dtype in (torch.float32, torch.float64):
        W = matrix(12, 8).to(dtype)
        before = W.clone()
        for select in ("largest", "smallest", "random", "magnitude"):
            principal_indices(W, 8, 5, select)
        assert torch.equal(W, before)


def test_budget():
    assert budget((10, 30), density=0.05) == 15
    assert budget((10, 30), density=1e-9) == 1
    assert budget((10, 30), density=1.0) == 300
    assert budget((10, 30), lora_rank=2) == 80
    assert budget((10, 30), lora_rank=99) == 300


# The optimizer's laws


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_density_one_is_adamw_bit_for_bit(decay):
    ours, theirs = parameters(), parameters()
    lift = LIFT(ours, lr=3e-3, density=1.0, weight_decay=decay, filter_rank=4, refresh=3)
    adamw = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=decay, foreach=False)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=8) for o in (lift, adamw)]
    for step in range(8):
        for params, optimizer, schedule in zip((ours, theirs), (lift, adamw), schedules, strict=True):
            backward(params, gradients(step))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refresh", [None, 1, 3])
def test_equals_the_dense_restatement_bit_for_bit(dtype, refresh):
    params = parameters(dtype)
    options = {"lr": 0.05, "betas": (0.9, 0.95)}
    lift = LIFT(params, density=0.1, filter_rank=3, weight_decay=0.1, refresh=refresh, **options)
    oracles = [
        DenseLIFT(p.detach(), 3, budget(p.shape, density=0.1), decay=0.1, refresh=refresh, **options) for p in params
    ]
    for step in range(10):
        grads = [g.to(dtype) for g in gradients(step)]
        backward(params, grads)
        lift.step()
        for i, (p, oracle) in enumerate(zip(params, oracles, strict=True)):
            oracle.step(grads[i])
            chosen = lift.state[p]["indices"].long()
            assert torch.equal(chosen, oracle.M.flatten().nonzero().squeeze(1))
            for key, full in (("exp_avg", oracle.mu), ("exp_avg_sq", oracle.nu), ("age", oracle.age)):
                assert torch.equal(lift.state[p][key], full.flatten()[chosen].to(lift.state[p][key].dtype)), key
            assert torch.equal(lift.values(p), oracle.master.flatten()[chosen])
            assert torch.equal(p.detach(), oracle.W)
    if refresh:
        assert len(lift.refreshes) == 10 // refresh
        assert lift.refreshes[0].step == refresh
        assert any(r.overlap < 1 for r in lift.refreshes)  # or nothing was remapped and this test shows little


@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_the_number_of_threads_changes_no_bit(dtype, decay):
    # each of more entries than are updated together, so that there is something for each thread
    shapes, told = [(300, 300), (280, 310), (270, 330)], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        params = [nn.Parameter(matrix(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
        lift = LIFT(params, lr=1e-2, density=0.8, select="magnitude", refresh=2, weight_decay=decay)
        for step in range(4):
            backward(params, [matrix(*shape, seed=1000 * step + i) for i, shape in enumerate(shapes)])
            lift.step()
            lift.zero_grad()
        assert torch.get_num_threads() == threads
        told.append([*params, *(lift.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq", "age"))])
    assert len(told[0][-1].unique()) > 1  # of several ages
    for a, b in zip(*told, strict=True):
        assert torch.equal(a, b)


def test_overlap_is_intersection_over_union():
    params = parameters()
    lift = LIFT([(f"m{i}", p) for i, p in enumerate(params)], lr=0.3, density=0.1, filter_rank=3, refresh=2)
    before = [set(lift.state[p]["indices"].tolist()) for p in params]
    train(lift, params, range(2))
    after = [set(lift.state[p]["indices"].tolist()) for p in params]
    (done,) = lift.refreshes
    assert done.by_parameter == {
        f"m{i}": len(a & b) / len(a | b) for i, (a, b) in enumerate(zip(before, after, strict=True))
    }
    shared = sum(len(a & b) for a, b in zip(before, after, strict=True))
    assert done.overlap == shared / sum(len(a | b) for a, b in zip(before, after, strict=True)) < 1


def test_a_newcomer_takes_no_oversized_step():
    params = parameters()
    lift = LIFT(params, lr=0.2, density=0.1, filter_rank=3, refresh=20)
    train(lift, params, range(20))
    newcomers = {p: lift.state[p]["age"] == 0 for p in params}
    assert sum(int(new.sum()) for new in newcomers.values()) > 5
    before = {p: lift.values(p) for p in params}
    train(lift, params, range(20, 21))
    for p, new in newcomers.items():
        moved = (lift.values(p) - before[p])[new]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.2), rtol=1e-3, atol=0)  # |first step| = lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchosen_entries_keep_their_bytes(dtype):
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    lift = LIFT(params, lr=0.1, density=0.1, filter_rank=3, weight_decay=0.5, select="random")
    train(lift, params, range(5))
    for p, old in zip(params, before, strict=True):
        chosen = torch.zeros(p.numel(), dtype=torch.bool)
        chosen[lift.state[p]["indices"].long()] = True
        changed = (p.detach() != old).flatten()
        assert not changed[~chosen].any()
        assert changed[chosen].all()


def test_four_micro_batches_are_one_batch():
    whole, parts = parameters(), parameters()
    one, four = (LIFT(params, density=0.2, filter_rank=3) for params in (whole, parts))
    for step in range(3):
        pieces = [gradients(10 * step + k) for k in range(4)]
        backward(whole, [sum(gs) for gs in zip(*pieces, strict=True)])
        for piece in pieces:
            backward(parts, piece)
        for params in (whole, parts):
            assert all(p.grad is None for p in params)
        one.step()
        four.step()
    for key in ("exp_avg", "exp_avg_sq"):
        for a, b in zip(dense(whole, one, key), dense(parts, four, key), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_one_dense_gradient_at_a_time():
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    lift = LIFT(layers.parameters(), density=0.2, filter_rank=2)
    alive = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in layers.parameters()))
        )
    layers(torch.randn(3, 8)).sum().backward()
    assert alive == [0] * 5  # each gradient is gone before the next one comes
    lift.step()


@pytest.mark.parametrize(("max_norm", "scale"), [(0.5, 1.0), (1e4, 1.0), (float("inf"), 1.0), (1e-6, 1e-6)])
def test_clipping_is_torchs_on_the_chosen_entries(max_norm, scale):
    params, masked = parameters(), parameters()
    lift = LIFT(params, density=0.1, filter_rank=3, betas=(0.0, 0.9))
    for step, arrived in enumerate((slice(None), slice(1, 3))):  # what a step before has left is no part of a norm
        grads = [scale * g for g in gradients(step)][arrived]
        for p, q, g in zip(params[arrived], masked[arrived], grads, strict=True):
            chosen = lift.state[p]["indices"].long()
            q.grad = torch.zeros(q.numel()).index_copy(0, chosen, g.flatten()[chosen]).view(q.shape)
        expected = nn.utils.clip_grad_norm_(masked[arrived], max_norm)
        backward(params[arrived], grads)
        torch.testing.assert_close(lift.clip_grad_norm_(max_norm), expected, rtol=1e-5, atol=0)
        lift.step()  # beta1 = 0: the first moment is the gradient
        for q, found in zip(masked, dense(params, lift, "exp_avg"), strict=True):
            torch.testing.assert_close(found, q.grad.flatten(), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_uses_up_gradients_and_zero_grad_drops_them(dtype):
    params = parameters(dtype)
    lift = LIFT(params, density=0.1, filter_rank=3, betas=(0.0, 0.9))
    backward(params, gradients(0))
    lift.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient"):
        lift.step()
    for step in (1, 2):  # no zero_grad between: a training loop may only call model.zero_grad()
        backward(params, gradients(step))
        lift.step()
    for p, g in zip(params, gradients(2), strict=True):
        mine = g.to(dtype).float().flatten()[lift.state[p]["indices"].long()]
        torch.testing.assert_close(lift.state[p]["exp_avg"], mine)


def test_parameters_without_gradient_are_left_alone():
    ours, theirs = parameters(), parameters()
    lift = LIFT(ours, density=1.0, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, weight_decay=0.1, foreach=False)
    for step, absent in enumerate([(1,), (), (0, 3), (2,)]):
        for params, optimizer in ((ours, lift), (theirs, adamw)):
            present = [i for i in range(len(SHAPES)) if i not in absent]
            backward([params[i] for i in present], [gradients(step)[i] for i in present])
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    assert [int(lift.state[p]["age"][0]) for p in ours] == [3, 3, 3, 3]


def test_a_gradient_put_in_by_hand_counts():
    by_hand, by_backward = parameters(), parameters()
    a, b = (LIFT(params, density=0.1, filter_rank=3) for params in (by_hand, by_backward))
    for p, g in zip(by_hand, gradients(0), strict=True):
        p.grad = g
    backward(by_backward, gradients(0))
    a.step()
    b.step()
    assert all(torch.equal(p, q) for p, q in zip(by_hand, by_backward, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [2, 3, 7])  # before, at and after refreshes
@pytest.mark.parametrize("select", ["largest", "random"])
def test_resume_is_bit_identical(dtype, cut, select):
    options = {"lr": 0.05, "density": 0.1, "filter_rank": 3, "weight_decay": 0.1, "refresh": 3, "select": select}
    straight = parameters(dtype)
    lift = LIFT(straight, **options)
    train(lift, straight, range(10))

    first = parameters(dtype)
    stopped = LIFT(first, **options)
    train(stopped, first, range(cut))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in first], "optimizer": stopped.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file)
    second = [nn.Parameter(w.clone()) for w in loaded["weights"]]
    resumed = LIFT(second, **{**options, "lr": 9.0})
    resumed.load_state_dict(loaded["optimizer"])
    train(resumed, second, range(cut, 10))

    for p, q in zip(straight, second, strict=True):
        assert torch.equal(p, q)
        for key, value in lift.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype
            assert torch.equal(value, resumed.state[q][key]), key


def test_loading_ones_own_state_changes_nothing():
    params = parameters(torch.bfloat16)
    lift = LIFT(params, density=0.1, filter_rank=3)
    train(lift, params, range(3))
    before = copy.deepcopy(lift.state_dict())
    lift.load_state_dict(lift.state_dict())
    for k, state in lift.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["state"][k][key])
    backward(params, gradients(3))
    lift.load_state_dict(before)  # the gradient was of other weights
    with pytest.raises(RuntimeError, match=r"no gradient .*call backward"):
        lift.step()
    for p in params:
        p.requires_grad_(False)  # as PEFT does where an adapter is put beside them
    with pytest.raises(RuntimeError, match=rf"{len(params)} of {len(params)} parameters, first .*frozen since.*PEFT"):
        lift.step()


def test_an_age_stays_at_the_largest_that_it_can_be():
    params = parameters()
    lift = LIFT(params, lr=0.05, density=0.1, filter_rank=3)
    train(lift, params, range(1))
    state = lift.state_dict()
    for own in state["state"].values():
        own["age"][::2] = 32766
    lift.load_state_dict(state)
    for step in range(1, 4):
        before = [lift.values(p) for p in params]
        train(lift, params, range(step, step + 1))
        for p, old in zip(params, before, strict=True):
            own = lift.state[p]
            assert own["age"][:4].tolist() == [32767, step + 1] * 2
            mean, square = (
                own[key] / (1 - beta ** own["age"]) for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999))
            )
            torch.testing.assert_close(lift.values(p) - old, -0.05 * mean / square.sqrt(), rtol=1e-3, atol=1e-6)


def test_loading_refuses_what_does_not_fit():
    params = parameters()
    lift = LIFT([(f"m{i}", p) for i, p in enumerate(params)], density=0.1, filter_rank=3)
    with pytest.raises(ValueError, match=r"density was 0\.2, is 0\.1"):
        lift.load_state_dict(LIFT(parameters(), density=0.2, filter_rank=3).state_dict())
    adamw = torch.optim.AdamW(params)
    backward(params, gradients(0))
    with pytest.raises(ValueError, match="not LIFT's"):
        lift.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="1 parameters"):
        lift.load_state_dict(LIFT(parameters()[:1], density=0.1).state_dict())
    lift.step()


def test_masters_make_progress_where_bfloat16_loses_it():
    start = torch.full((16, 16), 1.0)
    weights = [nn.Parameter(start.bfloat16()) for _ in range(2)]
    lift = LIFT([weights[0]], lr=1e-4, density=1.0)
    adamw = torch.optim.AdamW([weights[1]], lr=1e-4, weight_decay=0.0, foreach=False)
    for _ in range(100):
        for p, optimizer in zip(weights, (lift, adamw), strict=True):
            p.float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(weights[1].float(), start)  # every step was under half a unit in the last place
    torch.testing.assert_close(weights[0].float(), start - 0.01, rtol=0, atol=2**-8)
    assert (weights[0] < 1).all()
    torch.testing.assert_close(lift.values(weights[0]), start.flatten() - 0.01, rtol=0, atol=1e-5)


def test_state_is_at_most_a_tenth_of_adamws():
    p = nn.Parameter(matrix(200, 300))
    lift = LIFT([p], density=0.05)
    assert sum(v.numel() * v.element_size() for v in lift.state[p].values()) <= 0.10 * 8 * p.numel()
    for betas in ((0.9, 0.9999), (0.9999, 0.9)):
        slow = LIFT([nn.Parameter(matrix(8, 8))], density=0.5, filter_rank=2, betas=betas)
        assert (
            next(iter(slow.state.values()))["age"].dtype == torch.int32
        )  # int16 would stop before the correction does


def test_groups_have_their_own_options():
    params = parameters()
    lift = LIFT(
        [
            {"params": params[:2], "lr": 0.0},
            {"params": params[2:], "density": None, "lora_rank": 1, "refresh": 2, "select": "magnitude"},
        ],
        density=0.1,
        filter_rank=3,
    )
    before = [p.detach().clone() for p in params]
    train(lift, params, range(4))
    assert [len(lift.state[p]["indices"]) for p in params] == [38, 64, 34, 42]
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [True, True, False, False]
    assert [r.step for r in lift.refreshes] == [2, 4]
    backward(params[:2], gradients(4)[:2])
    lift.step()
    train(lift, params, range(5, 7))
    assert [r.step for r in lift.refreshes] == [2, 4, 6]  # steps of the group, of which one brought it no gradient
    assert [group["steps"] for group in lift.param_groups] == [7, 6]


def test_random_choice_depends_on_seed_and_place_only():
    twins = [nn.Parameter(matrix(20, 20)) for _ in range(2)]
    lift = LIFT(twins, density=0.1, select="random", refresh=1)
    first, second = (lift.state[p]["indices"].clone() for p in twins)
    assert not torch.equal(first, second)
    assert torch.equal(LIFT(twins, density=0.1, select="random").state[twins[1]]["indices"], second)
    assert not torch.equal(LIFT(twins, density=0.1, select="random", seed=1).state[twins[0]]["indices"], first)
    sum(p.sum() for p in twins).backward()
    lift.step()
    again = lift.state[twins[0]]["indices"].clone()
    assert not torch.equal(again, first)
    lift.close()
    rarely = LIFT(twins, density=0.1, select="random", refresh=2)
    for _ in range(2):
        sum(p.sum() for p in twins).backward()
        rarely.step()
    assert torch.equal(rarely.state[twins[0]]["indices"], again)  # of the refresh, not of its step
    groups = LIFT([{"params": twins[:1]}, {"params": twins[1:]}], density=0.1, select="random")
    assert torch.equal(groups.state[twins[1]]["indices"], second)
    both, third = nn.Parameter(torch.cat([p.detach() for p in twins])), nn.Parameter(matrix(20, 20))
    packed = LIFT([{"params": [(("0", "1"), both)]}, {"params": [third]}], density=0.1, select="random")
    flat = LIFT([*twins, third], density=0.1, select="random")
    assert torch.equal(packed.state[both]["indices"], torch.cat([first, second + 400]))
    assert torch.equal(packed.state[third]["indices"], flat.state[third]["indices"])


def test_tied_parameters_count_once():
    p, q = parameters()[:2]
    lift = LIFT([("a", p), ("b", q), ("tied", p)], density=0.1, filter_rank=3)
    assert [id(x) for x in lift.param_groups[0]["params"]] == [id(p), id(q)]
    assert lift.param_groups[0]["param_names"] == ["a", "b"]  # by the first of its names
    assert len(lift.state) == 2
    apart = LIFT([{"params": [("a", p)]}, {"params": [("tied", p), ("b", q)]}], density=0.1, filter_rank=3)
    assert [g["param_names"] for g in apart.param_groups] == [["a"], ["b"]]


def test_hooks_are_given_back():
    params = parameters()
    with LIFT(params, density=0.1, filter_rank=3) as lift:
        backward(params, gradients(0))
        assert all(p.grad is None for p in params)
    backward(params, gradients(0))
    assert all(p.grad is not None for p in params)
    with pytest.raises(RuntimeError, match="closed"):
        lift.step()
    for p in params:
        p.grad = None
    forgotten = LIFT(params, density=0.1, filter_rank=3)
    backward(params, gradients(0))
    assert all(p.grad is None for p in params)
    del forgotten
    gc.collect()
    backward(params, gradients(0))
    assert all(p.grad is not None for p in params)


# Bad input


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        LIFT(parameters(), density=density)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"density": 0.1, "lora_rank": 2}, "exactly one"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"density": 0.1, "select": "lift_sparse"}, "largest, smallest, random, magnitude"),
        ({"density": 0.1, "refresh": 0}, "refresh"),
        ({"density": 0.1, "filter_rank": 0}, "filter_rank"),
        ({"density": 0.1, "betas": (0.9, 1.0)}, "betas"),
        ({"density": 0.1, "lr": -1.0}, "lr"),
    ],
)
def test_bad_options(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        LIFT(parameters(), **options)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (nn.Parameter(torch.ones(4)), ValueError, "bad has shape"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False), TypeError, "bad.*quantised"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.float64)), TypeError, "bad.*float64"),
        (nn.Parameter(torch.ones(4, 4), requires_grad=False), ValueError, "bad does not require"),
        (nn.Parameter(torch.ones(4, 6).T), ValueError, "bad.*contiguous"),
        (nn.Parameter(torch.full((4, 4), torch.nan)), ValueError, "bad.*NaN"),
    ],
)
def test_bad_parameters_are_named(p, error, message):
    good = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(error, match=message):
        LIFT([("good", good), ("bad", p)], density=0.5, filter_rank=2)
    good.sum().backward()
    assert good.grad is not None  # no hook stays behind
    lift = LIFT([("good", good)], density=0.5, filter_rank=2)
    with pytest.raises(error, match=message):
        lift.add_param_group({"params": [("bad", p)]})
    lift.step()  # nor half a group
    lift.close()


def test_weights_gone_bad_at_a_refresh_are_named():
    p, q = (nn.Parameter(matrix(6, 6)) for _ in range(2))
    lift = LIFT([("fine", p), ("sick", q)], density=0.5, filter_rank=2, refresh=2)
    for step in range(2):
        (p.sum() + (q * (torch.nan if step else 1.0)).sum()).backward()
        if step == 0:
            lift.step()
    with pytest.raises(ValueError, match=r"sick after 2 steps.*NaN"):
        lift.step()


@pytest.mark.parametrize(
    ("W", "rank", "count", "message"),
    [
        (torch.ones(4), 1, 1, "matrix"),
        (torch.ones(4, 4), 1, 17, "count 17"),
        (torch.ones(4, 4), 1, 0, "count 0"),
        (torch.ones(4, 4), 0, 1, "rank"),
        (torch.full((4, 4), torch.inf), 1, 1, "infinite"),
    ],
)
def test_bad_arguments_of_principal_indices(W, rank, count, message, unchecked):
    with pytest.raises(ValueError, match=message):
        principal_indices(W, rank, count)

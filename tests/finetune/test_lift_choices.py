"""Budgets, blocks, one threshold, other rules of choice, and what a refresh may do."""

import io
import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from finetune.lift import LIFT, Select, budget, principal_indices
from finetune.lift.selection import Matrix, choose
from finetune.lift.warm import warm_subspace
from surgery.linalg import principal_subspace
from tests.oracles.lift import from_triplets, in_blocks, pooled, top, truncated

SHAPES = [(24, 16), (16, 40), (20, 20), (8, 32)]  # tiled by squares of four
SELECTS = get_args(Select)


def matrix(out: int, into: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    W = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    if decay:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * S * torch.arange(1, len(S) + 1) ** -decay) @ Vh
    return W


def parameters(dtype: torch.dtype = torch.float32, scales: tuple[float, ...] = (1, 1, 1, 1)) -> list[nn.Parameter]:
    return [nn.Parameter((matrix(*shape, seed=i) * scales[i]).to(dtype)) for i, shape in enumerate(SHAPES)]


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{i // 2}.{'attn.q' if i % 2 else 'mlp.up'}", p) for i, p in enumerate(params)]


def gradients(step: int) -> list[Tensor]:
    return [matrix(*shape, seed=1000 * step + i) for i, shape in enumerate(SHAPES)]


def backward(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    torch.stack([(p * g.to(p.dtype)).sum().float() for p, g in zip(params, grads, strict=True)]).sum().backward()


def train(optimizer: LIFT, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        backward(params, gradients(step))
        optimizer.step()
        optimizer.zero_grad()


def positions(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def chosen(lift: LIFT, params: list[nn.Parameter]) -> list[Tensor]:
    return [lift.state[p]["indices"].long() for p in params]


# Rules


def entries(W: Tensor, G: Tensor, select: Select, rank: int, seed: int) -> Tensor:
    """What the rule compares, entry by entry, restated."""
    short = min(W.shape)
    match select:
        case "largest" | "smallest":
            return truncated(W, rank)
        case "magnitude":
            return W.double()
        case "gradient":
            return G.double()
        case "movement":
            return -G.double() * W.double()
        case "hybrid":
            return from_triplets(W, [*range((rank + 1) // 2), *range(short - rank // 2, short)])
        case "smallest-triplets":
            return from_triplets(W, list(range(short - rank, short)))
        case "random-triplets":
            drawn = torch.randperm(short, generator=torch.Generator().manual_seed(seed))[:rank]
            return from_triplets(W, drawn.tolist())
        case "random":
            raise AssertionError("compares nothing")


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("select", [s for s in SELECTS if s != "random"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_every_rule_is_its_literal_restatement(select, block, shape):
    W, G, count = matrix(*shape, seed=1, decay=0.5), matrix(*shape, seed=2), 64
    found = principal_indices(W, 5, count, select, seed=3, block=block, gradient=G)
    compared = entries(W, G, select, 5, 3)
    by_size = compared if select == "movement" else compared.abs()
    if block > 1:
        by_size = pooled(compared if select == "movement" else compared**2, block)
    (mask,) = top([-by_size if select == "smallest" else by_size], count // block**2)
    assert torch.equal(found.long(), positions(in_blocks(mask, block)))


@pytest.mark.parametrize("block", [1, 4])
def test_random_entries_are_as_many_and_spread_evenly(block):
    W = matrix(64, 48)
    draws = [principal_indices(W, 1, 320, "random", seed=s, block=block).long() for s in range(200)]
    assert all(len(d.unique()) == 320 for d in draws)
    hits = torch.bincount(torch.cat(draws), minlength=W.numel()).float()
    expected = 200 * 320 / W.numel()
    spread = pooled(hits.view(W.shape), block) / block**2  # in blocks every entry counts with its block
    assert abs(float(spread.mean()) - expected) < 1e-4
    assert (
        abs(float(spread.var()) / (expected * (1 - 320 / W.numel())) - 1) < 0.25
    )  # binomial, to what 200 draws can tell
    assert torch.equal(principal_indices(W, 1, 320, "random", seed=7, block=block).long(), draws[7])


def test_rules_differ():
    W, G = matrix(40, 24, decay=0.3), matrix(40, 24, seed=9)
    found = {s: frozenset(principal_indices(W, 6, 96, s, gradient=G).tolist()) for s in SELECTS}
    found["blocks"] = frozenset(principal_indices(W, 6, 96, block=4).tolist())
    assert len(set(found.values())) == len(found)


def test_blocks_are_whole():
    params = parameters()
    assert principal_indices(params[0].detach(), 3, 384, block=4).tolist() == list(range(384))
    lift = LIFT(params, density=0.2, filter_rank=3, block=4)
    for p, indices in zip(params, chosen(lift, params), strict=True):
        assert len(indices) == budget(p.shape, 0.2, block=4) == int(0.2 * p.numel()) // 16 * 16
        mask = torch.zeros(p.numel()).index_fill(0, indices, 1).view(p.shape)
        assert set(pooled(mask, 4).unique().tolist()) == {0.0, 16.0}


# Budgets


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("select", ["largest", "magnitude", "gradient", "movement"])
def test_one_threshold_is_the_joint_choice(select, block):
    params, grads = parameters(scales=(1, 7, 0.1, 2)), gradients(0)
    lift = LIFT(named(params), lr=0.0, density=0.2, filter_rank=3, scope="global", select=select, block=block)
    backward(params, grads)
    lift.step()
    scores = []
    for p, g in zip(params, grads, strict=True):
        compared = entries(p.detach(), g, select, 3, 0)
        unfiltered = p.detach().double() if select == "largest" else compared
        compared = compared / unfiltered.square().mean().sqrt()  # in units of the matrix's own root mean square
        if block > 1:
            scores.append(pooled(compared if select == "movement" else compared**2, block))
        else:
            scores.append(compared if select == "movement" else compared.abs())
    budgets = [budget(p.shape, 0.2, block=block) for p in params]
    masks = top(scores, sum(budgets) // block**2)
    found = chosen(lift, params)
    for indices, mask in zip(found, masks, strict=True):
        assert torch.equal(indices, positions(in_blocks(mask, block)))
    assert [len(i) for i in found] != budgets  # or it chose nothing that a budget for each would not
    assert sum(map(len, found)) == sum(budgets)


def test_one_threshold_may_leave_a_matrix_without_entries():
    params = [nn.Parameter(torch.full((8, 8), 1.0)), nn.Parameter(torch.zeros(8, 8))]
    with torch.no_grad():
        params[1].view(-1)[:4] = 9.0  # 4 entries far above the root mean square of their matrix
    lift = LIFT(params, density=4 / 128, scope="global", select="magnitude", refresh=1, weight_decay=0.1)
    assert [i.tolist() for i in chosen(lift, params)] == [[], [0, 1, 2, 3]]
    for _ in range(3):
        sum(p.sum() for p in params).backward()
        lift.clip_grad_norm_(1.0)
        lift.step()
    assert torch.equal(params[0], torch.ones(8, 8))
    assert not torch.equal(params[1][0, :4], torch.full((4,), 9.0))
    assert [list(done.by_parameter.values()) for done in lift.refreshes] == [[1.0, 1.0]] * 3  # no mask is as it was


def test_overrides_decide_by_the_last_pattern():
    params = parameters()
    own = {"*.mlp.*": 0.5, "*.attn.q": {"lora_rank": 1}, "1.mlp.up": None}
    for scope in ("matrix", "global"):
        lift = LIFT(named(params), density=0.1, filter_rank=3, overrides=own, scope=scope)
        assert set(lift.state) == {params[0], params[1], params[3]}
        assert [len(lift.state[p]["indices"]) for p in (params[0], params[1], params[3])] == [192, 56, 40]
        lift.close()
    lift = LIFT(named(params), density=0.1, filter_rank=3, overrides={"0.**": 0.5}, scope="global")
    counts = [len(i) for i in chosen(lift, params)]
    assert counts[:2] == [192, 320]  # their own
    assert sum(counts[2:]) == budget(SHAPES[2], 0.1) + budget(SHAPES[3], 0.1)  # one budget for the others


def test_left_out_parameters_are_left_alone():
    params = parameters()
    lift = LIFT(named(params), density=0.1, filter_rank=3, overrides={"1.**": None})
    backward(params, gradients(0))
    assert [p.grad is None for p in params] == [True, True, False, False]  # another optimizer may want them
    before = [p.detach().clone() for p in params]
    lift.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, False, True, True]


@pytest.mark.parametrize("select", SELECTS)
def test_everything_chosen_is_adamw_whatever_the_rule(select):
    ours, theirs = parameters(), parameters()
    lift = LIFT(named(ours), lr=3e-3, density=1.0, select=select, filter_rank=3, refresh=2, scope="global", block=2)
    adamw = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.0, foreach=False)
    for step in range(5):
        for params, optimizer in ((ours, lift), (theirs, adamw)):
            backward(params, gradients(step))
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


# By the gradient


@pytest.mark.parametrize("select", ["gradient", "movement"])
def test_the_first_gradient_chooses_and_is_taken(select):
    params, masked = parameters(), parameters()
    lift = LIFT(named(params), lr=0.05, density=0.1, select=select, refresh=3)
    adamw = torch.optim.AdamW(masked, lr=0.05, weight_decay=0.0, foreach=False)
    masks: list[Tensor] = []
    for step in range(3):
        pieces = [[g * part for g in gradients(step)] for part in (0.25, 0.75)]  # two micro-batches
        for piece in pieces:
            backward(params, piece)
        grads = [a + b for a, b in zip(*pieces, strict=True)]
        if step == 0:
            assert all(p.grad is not None for p in params)  # whole, to choose by
            for p, g in zip(params, grads, strict=True):
                compared = entries(p.detach(), g, select, 1, 0)
                masks += top([compared.abs() if select == "gradient" else compared], budget(p.shape, 0.1))
        else:
            assert all(p.grad is None for p in params)
        for q, g, mask in zip(masked, grads, masks, strict=True):
            q.grad = g * mask
        norm = nn.utils.clip_grad_norm_(masked, 2.0)
        torch.testing.assert_close(lift.clip_grad_norm_(2.0), norm)
        lift.step()
        adamw.step()
        for p, q in zip(params, masked, strict=True):
            torch.testing.assert_close(p, q)
    before = chosen(lift, params)
    assert not lift.refreshes
    backward(params, gradients(3))  # the refresh is due, with this gradient
    assert all(p.grad is not None for p in params)
    lift.step()
    (done,) = lift.refreshes
    assert done.step == 3
    assert done.overlap < 1
    assert not all(torch.equal(a, b) for a, b in zip(before, chosen(lift, params), strict=True))
    backward(params, gradients(4))
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_the_first_choice_by_gradients_is_theirs_whatever_a_refresh_may_do(scope):
    params = parameters()
    options = {"density": 0.3, "refresh": 9, "min_change": 1.0, "grow_to": 0.4}
    lift = LIFT(named(params), select="gradient", scope=scope, **options)
    plain = LIFT(named(twins := parameters()), select="gradient", scope=scope, density=0.3)
    for optimizer, own in ((lift, params), (plain, twins)):
        train(optimizer, own, range(1))
    assert all(torch.equal(a, b) for a, b in zip(chosen(lift, params), chosen(plain, twins), strict=True))


def test_a_rule_of_gradients_needs_them_all():
    params = parameters()
    lift = LIFT(named(params), density=0.1, select="gradient")
    backward(params[:3], gradients(0)[:3])
    with pytest.raises(ValueError, match=r"1\.attn\.q after 0 steps.*needs a gradient"):
        lift.step()


# Refreshes


def test_little_change_is_not_taken_up():
    def run(**options: float) -> LIFT:
        params = parameters()
        lift = LIFT(named(params), lr=0.2, density=0.1, filter_rank=3, refresh=2, **options)
        train(lift, params, range(2))
        lift.close()
        return lift

    (free,) = run().refreshes
    assert free.adopted
    shared = 2 * free.overlap / (1 + free.overlap)  # of masks of one size: the fraction kept
    low, high = run(min_change=1 - shared - 1e-6), run(min_change=1 - shared + 1e-6)
    assert low.refreshes == [free]
    assert high.refreshes[0].overlap == free.overlap
    assert not high.refreshes[0].adopted
    first = LIFT(named(parameters()), density=0.1, filter_rank=3)
    for mine, kept, fresh in zip(first.state.values(), high.state.values(), low.state.values(), strict=True):
        assert torch.equal(mine["indices"], kept["indices"])
        assert kept["age"].min() == 2
        assert fresh["age"].min() == 0


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_growing_mask_loses_nobody_and_stops_at_its_cap(scope, block):
    params = parameters()
    options = {
        "density": 0.15,
        "refresh": 1,
        "grow_to": 0.3,
        "min_change": 1e-4,
        "select": "random",
    }  # which never runs out of newcomers
    lift = LIFT(named(params), lr=0.5, scope=scope, block=block, **options)
    cap = [budget(p.shape, 0.3, block=block) for p in params]
    history = [[set(i.tolist()) for i in chosen(lift, params)]]
    for step in range(25):
        train(lift, params, range(step, step + 1))
        history.append([set(i.tolist()) for i in chosen(lift, params)])
    for before, after in itertools.pairwise(history):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    sizes = [[len(s) for s in sets] for sets in history]
    assert sum(sizes[0]) < sum(sizes[2])
    if scope == "matrix":
        assert sizes[-1] == cap
    assert sum(sizes[-1]) == sum(cap)
    full = next(i for i, sets in enumerate(sizes) if sum(sets) == sum(cap))
    assert len(lift.refreshes) == full  # nothing is chosen any more


def test_the_last_room_goes_to_the_largest_newcomers():
    p = nn.Parameter(torch.tensor([[9.0, 8.0, 1.0, 2.0], [3.0, 4.0, 5.0, 6.0]]))
    lift = LIFT([p], lr=1.0, density=0.5, select="magnitude", refresh=1, grow_to=0.75, betas=(0.0, 0.9))
    assert lift.state[p]["indices"].tolist() == [0, 1, 6, 7]
    with torch.no_grad():
        p.copy_(
            torch.tensor([[0.0, 0.0, 12.0, 13.0], [11.0, 14.0, 0.0, 0.0]])
        )  # from outside: all four others are larger now
    (p * 0).sum().backward()
    lift.step()
    assert lift.state[p]["indices"].tolist() == [0, 1, 3, 5, 6, 7]


# The filter begun from the last one


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (200, 200)])
@pytest.mark.parametrize("moved", [0.003, 0.03, 0.2])
def test_a_warm_start_keeps_its_word(shape, decay, moved):
    agreements = []
    for seed in range(4):
        W = matrix(*shape, seed=seed, decay=decay)
        start = principal_subspace(W, 20).float()
        after = W + moved * W.square().mean().sqrt() * matrix(*shape, seed=seed + 50)
        basis = warm_subspace(after, start, 12, 1e-3)
        if basis is None:
            continue
        torch.testing.assert_close(basis.T @ basis, torch.eye(20), atol=1e-5, rtol=0)
        basis = basis[:, :12]
        filtered = (after @ basis) @ basis.T if shape[1] <= shape[0] else basis @ (basis.T @ after)
        count = budget(shape, 0.05)
        exact = principal_indices(after, 12, count)
        ours = filtered.abs().flatten().topk(count).indices
        agreements.append(float(torch.isin(exact.long(), ours).float().mean()))
        error = (filtered - truncated(after, 12)).norm() / truncated(after, 12).norm()
        assert error < 4e-3
    if moved < 0.1 and decay:  # a flat spectrum hardly has a leading part
        assert len(agreements) == 4
    if agreements:
        assert sum(agreements) / len(agreements) >= 0.998


@pytest.mark.parametrize("moved", [0.005, 0.15])
def test_every_warm_choice_agrees_as_much_as_was_asked(moved):
    """Also where the spectrum is flat, so that the first steps' changes are small beside what is still to come."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(192, 300, generator=generator) * torch.arange(1, 193)[:, None] ** -0.2
        W = torch.linalg.qr(torch.randn(192, 192, generator=generator)).Q @ W
        start = principal_subspace(W, 24).float()
        after = W + moved * W.square().mean().sqrt() * torch.randn(192, 300, generator=generator)
        (ours,) = choose([Matrix("", after, 2880, start=start)], "largest", 16, agreement=0.999)
        assert ours.warm
        assert float(torch.isin(principal_indices(after, 16, 2880), ours.indices).float().mean()) >= 0.999


def test_a_change_that_grows_is_not_the_last():
    """The start has the fifth direction for the fourth: little moves at first, and then each step moves more than the one before."""
    W = torch.diag(torch.cat([torch.ones(4), torch.tensor([0.9]), torch.linspace(0.88, 0.1, 55)]))
    start = torch.eye(60)[:, [0, 1, 2, 4]]
    start[3, 3] = 1e-5
    start[5:] += 1e-4 * torch.cos(torch.arange(55.0)[:, None] * torch.arange(1.0, 5.0)) / 55**0.5
    basis = warm_subspace(W, start, 4, 1e-2)
    assert (W @ basis @ basis.T - truncated(W, 4)).norm() / truncated(W, 4).norm() < 1e-2


def test_a_hopeless_start_is_given_up():
    W = matrix(300, 200)
    assert warm_subspace(W, torch.linalg.qr(matrix(200, 12, seed=5)).Q, 12, 1e-9) is None
    with pytest.raises(ValueError, match="NaN"):
        warm_subspace(W / 0, torch.linalg.qr(matrix(200, 12, seed=5)).Q, 12, 1e-3)


def test_warm_refreshes_are_counted_and_agree():
    def run(agreement: float) -> tuple[LIFT, list[nn.Parameter]]:
        params = [nn.Parameter(matrix(120, 200, seed=i, decay=0.5)) for i in range(3)]
        lift = LIFT(
            [(f"{i}.mlp.up", p) for i, p in enumerate(params)], lr=3e-3, density=0.05, refresh=4, agreement=agreement
        )
        for step in range(12):
            torch.stack([(p * matrix(120, 200, seed=step)).sum() for p in params]).sum().backward()
            lift.step()
        return lift, params

    (warm, ours), (exact, theirs) = run(0.99), run(1.0)
    assert [done.warm for done in exact.refreshes] == [0, 0, 0]
    assert [done.warm for done in warm.refreshes] == [3, 3, 3]
    assert all("basis" in warm.state[p] for p in ours)
    assert not any("basis" in exact.state[p] for p in theirs)
    same = [torch.isin(a, b).float().mean() for a, b in zip(chosen(warm, ours), chosen(exact, theirs), strict=True)]
    assert min(same) >= 0.99
    assert any(done.overlap < 1 for done in exact.refreshes)


# Resume


VARIANTS = [
    *({"select": select} for select in SELECTS),
    {"scope": "global"},
    {"scope": "global", "select": "gradient"},
    {"block": 4, "density": 0.2},
    {"grow_to": 0.3},
    {"grow_to": 0.3, "scope": "global", "select": "movement"},
    {"min_change": 0.2},
    {"agreement": 0.9},
    {"overrides": {"0.**": 0.3, "1.mlp.*": None}},
]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(v, torch.bfloat16) for v in VARIANTS] + [(VARIANTS[0], torch.float32), (VARIANTS[0], torch.float16)],
    ids=str,
)
def test_every_variant_resumes_bit_for_bit(variant, dtype):
    options = {"lr": 0.05, "density": 0.1, "filter_rank": 3, "weight_decay": 0.1, "refresh": 3} | variant
    straight = parameters(dtype)
    lift = LIFT(named(straight), **options)
    train(lift, straight, range(8))
    for cut in (2, 3, 4):  # before, at and after a refresh
        first = parameters(dtype)
        stopped = LIFT(named(first), **options)
        train(stopped, first, range(cut))
        file = io.BytesIO()
        torch.save({"weights": [p.detach() for p in first], "optimizer": stopped.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file)
        second = [nn.Parameter(w.clone()) for w in loaded["weights"]]
        resumed = LIFT(named(second), **options)
        resumed.load_state_dict(loaded["optimizer"])
        for params in (first, second):
            backward(params, gradients(cut))
        assert [p.grad is None for p in first] == [
            p.grad is None for p in second
        ]  # whole where they are to be chosen by
        resumed.zero_grad()
        train(resumed, second, range(cut, 8))
        for p, q in zip(straight, second, strict=True):
            assert torch.equal(p, q)
            assert lift.state[p].keys() == resumed.state[q].keys()
            for key, value in lift.state[p].items():
                assert value.dtype == resumed.state[q][key].dtype
                assert torch.equal(value, resumed.state[q][key]), key
        assert resumed.refreshes == lift.refreshes


@pytest.mark.parametrize(
    "other",
    [
        {"density": 0.2}, {"scope": "global"}, {"seed": 1}, {"select": "smallest"}, {"filter_rank": 4}, {"refresh": 2}, {"block": 4},
        {"grow_to": 0.5}, {"min_change": 0.1}, {"agreement": 0.9}, {"overrides": {"0.**": 0.3}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_another_choice_is_refused(other):
    options = {"density": 0.1, "filter_rank": 3, "refresh": 3}
    lift = LIFT(named(parameters()), **options)
    (key,) = other
    with pytest.raises(ValueError, match=f"another run's: {key} was"):
        lift.load_state_dict(LIFT(named(parameters()), **(options | other)).state_dict())
    lift.load_state_dict(LIFT(named(parameters()), lr=9.0, **options).state_dict())
    assert lift.param_groups[0]["lr"] == 9.0


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "model"}, "scope is one of matrix, global"),
        ({"block": 3}, "blocks of side 3 do not tile a 24x16 matrix, which is 0.mlp.up"),
        ({"block": 0}, "blocks of side 0"),
        ({"min_change": 0.1}, "give refresh"),
        ({"grow_to": 0.5}, "give refresh"),
        ({"agreement": 0.9}, "give refresh"),
        ({"agreement": 0.9, "refresh": 2, "select": "smallest"}, "always exact"),
        ({"agreement": 0.0, "refresh": 2}, "agreement is a fraction"),
        ({"grow_to": 1.5, "refresh": 2}, "grow_to is a fraction"),
        ({"grow_to": 0.05, "refresh": 2}, "0.mlp.up begins with 38 entries, more than the 19"),
        ({"min_change": 2.0, "refresh": 2}, "min_change is a fraction"),
        ({"overrides": {"*.mlp.down": 0.5}}, "matches no site"),
        ({"overrides": {"**": None}}, "nothing is left to train"),
        ({"overrides": {"**": {"rank": 3}}}, "density, {'lora_rank': n} or None"),
        ({"overrides": {"**": 2.0}}, "density is a fraction"),
    ],
)
def test_bad_options(options, message, unchecked):
    params = parameters()
    with pytest.raises(ValueError, match=message):
        LIFT(named(params), **({"density": 0.1, "filter_rank": 3} | options))
    backward(params, gradients(0))
    assert all(p.grad is not None for p in params)  # no hook stays behind


def test_bad_arguments_of_principal_indices(unchecked):
    W = matrix(8, 8)
    with pytest.raises(ValueError, match="whole number of 4x4 blocks"):
        principal_indices(W, 2, 8, block=4)
    with pytest.raises(ValueError, match="do not tile a 8x8"):
        principal_indices(W, 2, 9, block=3)
    with pytest.raises(ValueError, match="needs a gradient"):
        principal_indices(W, 2, 8, "movement")
    with pytest.raises(ValueError, match="the gradient holds NaN"):
        principal_indices(W, 2, 8, "gradient", gradient=W * torch.nan)
    with pytest.raises(ValueError, match="select is one of"):
        principal_indices(W, 2, 8, "lift_sparse")

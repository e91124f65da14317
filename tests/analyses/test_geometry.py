"""Update geometry: a literal oracle, planted changes whose geometry is known, and the shell."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from analyses.geometry import Geometry, change, decompose, geometry
from finetune.lift import principal_indices
from surgery.sites import Site
from surgery.weights import Delta, Weights
from tests.oracles import geometry as oracle

SHAPES = [(40, 24), (24, 40), (32, 32)]


def matrix(shape, seed=0, scale=1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 0.3])
def test_every_number_is_the_literal_one(shape, scale):
    W0 = matrix(shape)
    W1 = W0 + matrix(shape, 1, scale) * (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.4)
    found = asdict(change(decompose(W0, density=0.1, filter_rank=5, k=3), W1))
    expected = oracle.geometry(W0.numpy(), W1.numpy(), 0.1, 5, 3)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert set(found) - set(expected) == {"entries", "density"}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_on_the_principal_entries_is_all_there(shape):
    W0 = matrix(shape)
    at = principal_indices(W0, 6, int(0.1 * W0.numel())).long()
    W1 = W0.clone()
    W1.view(-1)[at] += matrix((len(at),), 1, 0.5)
    found = change(decompose(W0, density=0.1, filter_rank=6, k=3), W1)
    assert found.energy_principal == pytest.approx(1)
    assert found.overlap_changed_principal == found.overlap_largest_principal == found.overlap_stored_principal == 1
    assert found.changed == pytest.approx(found.density)
    assert found.overlap_changed_low < 0.05


def test_a_change_on_the_smallest_entries_is_all_there():
    W0 = matrix((40, 24))
    W1 = torch.where(W0.abs() <= W0.abs().flatten().kthvalue(96).values, W0 + 0.5, W0)
    found = change(decompose(W0, density=0.1, filter_rank=6, k=3), W1)
    assert found.energy_low == pytest.approx(1)
    assert found.overlap_changed_low == found.overlap_largest_low == 1
    assert found.energy_principal < 0.1


def test_a_random_change_is_indifferent():
    sites = {Site(layer, "mlp.up"): matrix((60, 50), layer) for layer in range(40)}
    moved = {site: 0.1 * matrix((60, 50), 100 + site.layer) for site in sites}
    found = geometry(Point(sites), Vector(moved), at="*.mlp.up", density=0.1, filter_rank=4, k=3).summary(draws=500)
    rows = found[(found.part == "all")].set_index("measure")
    for name in ("overlap_largest_principal", "overlap_largest_low", "energy_principal", "energy_low"):
        row = rows.loc[f"enrichment_{name}"]
        assert row.low <= 1 <= row.high, name
        assert 0.9 < row.low < row.high < 1.1
        assert (row.n, row.n_matrices) == (40, 40)


@pytest.mark.parametrize("r", [1, 4, 24])
def test_r_equal_singular_values_have_rank_r(r):
    W0 = matrix((40, 24)).double()
    U = torch.linalg.qr(matrix((40, r), 1).double()).Q
    V = torch.linalg.qr(matrix((24, r), 2).double()).Q
    found = change(decompose(W0.float(), k=3), (W0 + 2.0 * U @ V.T).float())
    assert found.stable_rank == pytest.approx(r, rel=1e-4)
    assert found.effective_rank == pytest.approx(r, rel=1e-3)
    assert found.spectral_ratio == pytest.approx(2.0 / float(torch.linalg.matrix_norm(W0, 2)), rel=1e-4)


@pytest.mark.parametrize("degrees", [0.01, 3.0, 60.0])
def test_a_known_rotation_is_found_on_its_side(degrees):
    s = torch.linspace(9, 1, 24, dtype=torch.float64)
    W0 = torch.zeros(40, 24, dtype=torch.float64)
    W0[:24] = torch.diag(s)
    turned = W0 @ oracle.rotation(24, 2, 10, degrees)  # the third right singular vector leaves the top three
    found = change(decompose(W0.float(), k=3), turned.float())
    assert found.angle_v_max == pytest.approx(degrees, rel=1e-3)
    assert found.angle_v_mean == pytest.approx(degrees / 3, rel=1e-3)
    assert found.angle_u_max < 1e-3
    assert found.spectral_drift < 1e-6
    assert found.gap == pytest.approx(float((s[2] - s[3]) / s[2]), rel=1e-5)
    left = change(decompose(W0.T.contiguous().float(), k=3), turned.T.contiguous().float())
    assert left.angle_u_max == pytest.approx(degrees, rel=1e-3)
    assert left.angle_v_max < 1e-3


def test_scaling_drifts_the_spectrum_and_turns_nothing():
    W0 = matrix((30, 20))
    found = change(decompose(W0, k=3), 1.25 * W0)
    assert found.spectral_drift == pytest.approx(0.25, rel=1e-5)
    assert found.norm_ratio == pytest.approx(0.25, rel=1e-5)
    assert found.spectral_ratio == pytest.approx(0.25, rel=1e-5)
    assert found.angle_u_max < 1e-3
    assert found.angle_v_max < 1e-3


@pytest.mark.parametrize("magnitude", [1e-8, 1.0, 1e4])
def test_what_bf16_cannot_see(magnitude):
    W0 = (magnitude * matrix((30, 20))).bfloat16()
    base = decompose(W0, k=3)
    hidden = change(base, W0.float() * (1 + 2**-10))
    assert (hidden.changed, hidden.changed_stored) == (1, 0)
    assert math.isnan(hidden.overlap_stored_principal)
    assert math.isnan(hidden.energy_stored_principal)
    seen = change(base, W0.float() * (1 + 2**-7))  # the next representable number, or beyond
    assert (seen.changed, seen.changed_stored) == (1, 1)


def test_weyl_and_wedin_hold():
    for seed in range(8):
        W0, D = matrix((40, 24), seed, 0.2), matrix((40, 24), 50 + seed, 0.02)
        W0[:3, :3] += 8 * torch.eye(3)  # so that there is a gap after the third singular value
        base = decompose(W0, k=3)
        found, s = change(base, W0 + D), base.spectrum
        shift = found.spectral_drift * float(s.square().sum().sqrt())
        assert shift <= float(D.norm()) * (1 + 1e-5)  # Mirsky: the whole spectrum moves no further than the matrix
        room = found.gap * float(s[2]) - float(torch.linalg.matrix_norm(D, 2))
        assert room > 0
        bound = float(torch.linalg.matrix_norm(D, 2)) / room
        assert math.sin(math.radians(max(found.angle_u_max, found.angle_v_max))) <= bound


def test_no_change_is_zero_everywhere():
    W0 = matrix((30, 20))
    found = asdict(change(decompose(W0, k=3), W0.clone()))
    for name, value in found.items():
        if name.startswith(("energy", "overlap")):
            assert math.isnan(value), name
        elif name not in ("entries", "density", "gap"):
            assert value == 0, name


def test_k_beyond_the_matrix_takes_what_there_is():
    found = change(decompose(matrix((6, 4)), k=8), matrix((6, 4), 1))
    assert found.gap == 1
    assert 0 < found.angle_u_max <= 90
    assert found.angle_v_max < 1e-4  # all of a four-dimensional space


class Point(Weights):
    """Weights held in a dict, without a model behind them."""

    def __init__(self, tensors: dict[Site, Tensor]):
        self.tensors = tensors

    def shapes(self):
        return {site: t.shape for site, t in self.tensors.items()}

    def dtype(self, site):
        return self[site].dtype

    def _resolve(self, site):
        return Site.parse(site)

    def __getitem__(self, site):
        return self.tensors[Site.parse(site)]

    def _read(self, site, rows):
        return self.tensors[site][rows]


class Vector(Delta):
    def __init__(self, tensors: dict[Site, Tensor]):
        self.tensors = tensors

    def shapes(self):
        return {site: t.shape for site, t in self.tensors.items()}

    def _read(self, site, rows):
        return self.tensors[site][rows]


@pytest.fixture
def base():
    parts = {"attn.q": (24, 24), "attn.k": (8, 24), "mlp.down": (24, 40)}
    tensors = {Site(i, p): matrix(s, 10 * i + len(p)).bfloat16() for i in range(4) for p, s in parts.items()}
    return Point({**tensors, Site(None, "norm"): torch.ones(24)})


@pytest.fixture
def delta(base):
    return Vector({site: 0.1 * matrix(base.shape(site), 77) for site in base if site.part != "norm"})


def test_weights_and_their_delta_are_the_same_change(base, delta):
    tuned = Point({site: t.float() + delta[site] if site in delta else t for site, t in base.tensors.items()})
    a = geometry(base, tuned, at=["*.attn.*", "*.mlp.*"], k=3)
    assert a == geometry(base, delta, at=["*.attn.*", "*.mlp.*"], k=3)
    both = geometry(base, {"one": tuned, "two": delta}, at=["*.attn.*", "*.mlp.*"], k=3)
    assert [r.change for r in both.rows if r.arm == "one"] == [r.change for r in a.rows]
    assert [r.change for r in both.rows if r.arm == "two"] == [r.change for r in a.rows]
    table = a.frame()
    assert list(table.columns[:4]) == ["arm", "site", "layer", "part"]
    assert len(table) == 12
    assert (table["enrichment_overlap_largest_low"] == table["overlap_largest_low"] / table["density"]).all()


def test_a_site_that_the_delta_lacks_is_unchanged(base, delta):
    some = Vector({site: t for site, t in delta.tensors.items() if site.layer == 1})
    found = geometry(base, some, at="*.attn.q", k=3)
    assert [row.change.changed > 0 for row in found.rows] == [False, True, False, False]


def test_every_option_changes_something(base, delta):
    plain = geometry(base, delta, at="*.attn.q", density=0.1, filter_rank=4, k=3)
    for option in ({"density": 0.3}, {"filter_rank": 9}, {"k": 5}, {"at": "*.attn.k"}):
        assert geometry(base, delta, **({"at": "*.attn.q", "density": 0.1, "filter_rank": 4, "k": 3} | option)) != plain


def test_progress_is_shown_when_asked(base, delta, capsys):
    geometry(base, delta, at="*.attn.q", k=3)
    assert capsys.readouterr().err == ""
    geometry(base, delta, at="*.attn.q", k=3, progress=True)
    assert "geometry" in capsys.readouterr().err


def test_summary_averages_matrices_and_counts_layers(base, delta):
    some = Vector(
        {site: t for site, t in delta.tensors.items() if site.layer == 1}
    )  # elsewhere shares of the moved are NaN
    found = geometry(base, {"a": some, "b": 2 * delta}, at=["*.attn.*", "*.mlp.*"], k=3)
    table, summary = found.frame(), found.summary(draws=200, seed=3)
    assert set(summary.part) == {"attn.q", "attn.k", "mlp.down", "all"}
    row = summary[(summary.arm == "b") & (summary.part == "all") & (summary.measure == "norm_ratio")].iloc[0]
    assert row.value == pytest.approx(table[table.arm == "b"].norm_ratio.mean())
    assert row.low < row.value < row.high
    assert (row.n, row.n_matrices, row.seed) == (4, 12, 3)
    row = summary[(summary.arm == "a") & (summary.part == "all") & (summary.measure == "energy_low")].iloc[0]
    assert row.value == pytest.approx(table[(table.arm == "a") & (table.layer == 1)].energy_low.mean())
    assert (row.n, row.n_matrices) == (1, 3)
    assert not summary.equals(found.summary(draws=200, seed=4))
    one_layer = geometry(base, delta, at="0.attn.*", k=3).summary(draws=50)
    assert one_layer.low.isna().all()


def test_saved_and_loaded_is_the_same(base, delta, tmp_path):
    found = geometry(base, delta, at=["*.attn.*"], k=3)
    found.save(tmp_path / "geometry.json")
    assert Geometry.load(tmp_path / "geometry.json") == found
    unchanged = geometry(base, Vector({}), at="*.attn.q", k=3)  # full of NaN
    unchanged.save(tmp_path / "geometry.json")
    assert Geometry.load(tmp_path / "geometry.json").frame().equals(unchanged.frame())
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"at": "*.attn.z"}, "matches no"),
        ({"at": "norm"}, "norm is not"),
        ({"at": "*.attn.q", "density": 0}, "density"),
        ({"at": "*.attn.q", "filter_rank": 0}, "rank"),
        ({"at": "*.attn.q", "k": 0}, "rank 0"),
    ],
)
def test_bad_input_is_named(base, delta, options, says):
    with pytest.raises(ValueError, match=says):
        geometry(base, delta, **options)


def test_no_arms_and_other_shapes_are_named(base, delta):
    with pytest.raises(ValueError, match="no change"):
        geometry(base, {}, at="*.attn.q")
    wide = Vector({Site.parse("0.attn.q"): matrix((24, 25))})
    with pytest.raises(ValueError, match=r"The arm 'w' is of another model: in it 0\.attn\.q has shape \(24, 25\)"):
        geometry(base, {"w": wide}, at="*.attn.q")
    fewer = Point({site: base[site] for site in base if site.layer != 2})
    with pytest.raises(ValueError, match=r"in it 2\.attn\.q is not there, in the base it has shape \(24, 24\)"):
        geometry(base, fewer, at="*.attn.q")
    with pytest.raises(ValueError, match="cannot have changed"):
        change(decompose(matrix((6, 4))), matrix((4, 6)))

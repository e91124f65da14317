"""Sites are read back as they are printed; patterns name what they say, and say what exists when they name nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.sites import Site, match

PARTS = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "attn.q.bias", "attn.norm"]
SITES = [Site(None, "embed"), Site(None, "norm"), *(Site(layer, part) for layer in range(12) for part in PARTS)]

names = st.from_regex(r"[a-z_]{2,8}", fullmatch=True).filter(lambda s: s != "file")
sites = st.builds(
    Site,
    st.none() | st.integers(0, 200),
    st.lists(names, min_size=1, max_size=3).map(".".join),
    st.none() | st.integers(0, 100),
)


@given(sites)
def test_a_site_is_read_back_as_it_is_printed(site):
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site
    assert match(site.whole, [site.whole]) == [site.whole]


@given(st.lists(sites, unique=True))
def test_sites_have_one_order(some):
    once = sorted(some)
    assert sorted(once) == once
    layers = [-1 if s.layer is None else s.layer for s in once]
    assert layers == sorted(layers)


def test_the_names_of_the_docstring():
    assert Site.parse("12.mlp.down") == Site(12, "mlp.down")
    assert Site.parse("12.attn.o.h3") == Site(12, "attn.o", 3)
    assert Site.parse("12.resid") == Site(12, "resid")
    assert Site.parse("embed") == Site(None, "embed")
    assert Site.parse("file:vision.h3") == Site.unnamed("vision.h3") == Site(None, "file:vision.h3")
    assert str(Site(3, "attn.q.bias", 2)) == "3.attn.q.bias.h2"
    assert Site(3, "attn.o", 2).whole == Site(3, "attn.o")


@pytest.mark.parametrize("text", ["*.attn.o", "", "3..q", ".", "a b", "layer[0]"])
def test_text_that_is_no_site(text):
    with pytest.raises(ValueError, match=r"is not a site\. A site looks like 12\.mlp\.down"):
        Site.parse(text)


def test_a_layer_is_not_yet_a_site():
    with pytest.raises(ValueError, match=r"'12' names a layer but no part of it.*12\.mlp\.down"):
        Site.parse("12")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("**", len(SITES)),
        ("*.attn.o", 12),
        ("*.attn.*", 12 * 5),
        ("*.attn.**", 12 * 6),
        ("**.bias", 12),
        ("4-8.mlp.*", 5 * 3),
        ("10-99.mlp.down", 2),
        ("1*.attn.q", 3),  # 1, 10 and 11
        ("1.attn.q", 1),
        ("1?.attn.q", 2),
        ("*.mlp.[gu]*", 24),
        ("embed", 1),
        ("*", 2),  # one segment: what lies outside the layers
        (["embed", "*.attn.o", "3.attn.o"], 13),
    ],
)
def test_patterns(pattern, count):
    found = match(pattern, SITES)
    assert len(found) == len(set(found)) == count
    assert found == [s for s in SITES if s in set(found)]  # in the order of what was given


def test_a_head_of_all_that_the_rest_matches():
    assert match("3-4.attn.o.h7", SITES) == [Site(3, "attn.o", 7), Site(4, "attn.o", 7)]
    assert match(["3.attn.o.h7", "3.attn.o.h2", "3.attn.o"], SITES) == [
        Site(3, "attn.o"),
        Site(3, "attn.o", 2),
        Site(3, "attn.o", 7),
    ]


def test_unnamed_tensors_are_matched_by_their_own_pattern_only():
    odd = [*SITES, Site.unnamed("vision.blocks.0.h3")]
    assert match("file:vision.*", odd) == [odd[-1]]
    assert match("**", odd) == SITES


def test_a_pattern_that_matches_nothing_says_what_exists():
    with pytest.raises(ValueError) as error:
        match("*.attn.out", SITES)
    text = str(error.value)
    assert text.startswith("The pattern '*.attn.out' matches no site. Did you mean *.attn.")
    assert "Layers 0 to 11 have: attn.k, attn.norm, attn.o, attn.q, attn.q.bias" in text
    assert "Outside the layers: embed, norm." in text
    with pytest.raises(ValueError, match=r"Did you mean 3\.mlp\.down\?"):
        match("3.mlp.dwon", SITES)
    with pytest.raises(ValueError, match=r"Did you mean embed\?"):
        match("embd", SITES)
    with pytest.raises(ValueError, match="Layers 0 to 11"):
        match("12.attn.o", SITES)
    with pytest.raises(ValueError, match=r"'8-4\.attn\.o' matches no site"):
        match(["*.attn.o", "8-4.attn.o"], SITES)  # one good pattern does not hide a bad one
    with pytest.raises(ValueError, match=r"No site is named: the list of patterns is empty"):
        match([], SITES)


def test_a_suggestion_is_never_what_was_asked():
    with pytest.raises(ValueError) as error:
        match("12.attn.o", SITES)
    assert "Did you mean" not in str(error.value)
    with pytest.raises(ValueError, match=r"Did you mean \*\.resid\?"):
        match("resid", [Site(0, "resid"), Site(0, "mid")])

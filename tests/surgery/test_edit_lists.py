"""Edit lists: what each line means, and one clear error for each mistake."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint
from surgery.edit_lists import read_direction, read_edits, read_numbers
from surgery.edits import AddDirection, RemoveDirection, ReplaceLayers, Scale, SwapLayers, TruncateRank
from surgery.sites import Site
from surgery.weights import apply
from tests.families import save_tiny

U = torch.randn(32, generator=torch.Generator().manual_seed(5))
V = torch.randn(12, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two tiny models and vectors in every form."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny("llama", folder / "base")
    save_tiny("llama", folder / "other", seed=1)
    (folder / "directions").mkdir()
    save_file({"u": U}, folder / "directions" / "u.safetensors")
    save_file(
        {"u": U.to(torch.bfloat16), "v": V, "two": torch.ones(2, 2), "n": torch.arange(3)},
        folder / "several.safetensors",
    )
    (folder / "v.json").write_text(json.dumps(V.tolist()))
    return folder


@pytest.fixture(scope="module")
def base(home):
    return Checkpoint(home / "base")


LIST = """
# what was done
edits:
  - remove: {direction: directions/u.safetensors, at: "*.attn.o", strength: 0.5}
  - add: {direction: "several.safetensors:u", at: "*.attn.o.h1", reads: v.json}
  - add: {direction: [1, 2.5, -3e-2, 0, 0, 0, 0, 0, 0, 0, 0, 0], at: 0.attn.q.h2, strength: 1e-3}
  - scale: {factor: 0.5, at: ["1.mlp.down", "2.attn.v.h1"]}
  - truncate: {rank: 4, at: "0-1.mlp.*", strength: 0.5}
  - swap: {layers: [0, 2], strength: 0.75}
  - replace: {layers: {1: 2}, from: other}
  - replace: {layers: [0], from: other, strength: 0.25}
"""


def test_a_list_is_its_edits_in_order(home, base):
    (home / "edits.yml").write_text(LIST)
    steps = read_edits(home / "edits.yml")
    point = base
    for step in steps:
        point = step(point)
    other = Checkpoint(home / "other")
    third = torch.tensor([1, 2.5, -0.03, *[0.0] * 9])
    expected = apply(RemoveDirection(U, 0.5), base, "*.attn.o")
    expected = apply(AddDirection(U.to(torch.bfloat16).float(), reads=V), expected, "*.attn.o.h1")
    expected = apply(AddDirection(third, 1e-3), expected, "0.attn.q.h2")
    expected = apply(Scale(0.5), expected, ["1.mlp.down", "2.attn.v.h1"])
    expected = apply(TruncateRank(4, 0.5), expected, "0-1.mlp.*")
    expected = apply(SwapLayers(0, 2, 0.75), expected)
    expected = apply(ReplaceLayers(other, [0], 0.25), apply(ReplaceLayers(other, {1: 2}), expected))
    for site in base:
        assert torch.equal(point[site].float(), expected[site].float()), site
    assert [step.files for step in steps[:3]] == [
        (home / "directions" / "u.safetensors",),
        (home / "several.safetensors", home / "v.json"),
        (),
    ]
    assert steps[6].files == (home / "other",)
    assert [str(s) for s in steps[3].sites(base)] == ["1.mlp.down", "2.attn.v"]
    assert {s.layer for s in steps[5].sites(base)} == {0, 2}
    assert steps[3].text == "scale: factor 0.5, at ['1.mlp.down', '2.attn.v.h1']"


def test_text_is_a_list_too(base):
    (step,) = read_edits("edits:\n  - scale: {factor: 2, at: norm}\n")
    assert torch.equal(step(base)["norm"], 2 * base["norm"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "- scael: {factor: 1, at: norm}",
            "edit 1: there is no edit 'scael'. Did you mean scale? Edits are remove, add, scale, truncate, swap, replace",
        ),
        ("- 7: {}", "there is no edit 7."),
        (
            "- scale",
            "edit 1: expected one edit with its fields, such as scale: {factor: 0.5, at: '12.mlp.down'}; found 'scale'",
        ),
        ("- {scale: {factor: 1, at: norm}, swap: {layers: [0, 1]}}", "expected one edit with its fields"),
        ("- scale: 0.5", "scale takes fields, as in scale: {factor: 0.5, at: '12.mlp.down'}; found 0.5"),
        ("- scale: {at: norm}", "edit 1 (scale): the field factor is missing"),
        ("- scale: {factor: 2}", "the field at is missing"),
        (
            "- scale: {factor: 2, at: norm, strenght: 1}",
            "there is no field 'strenght'. scale looks like scale: {factor: 0.5",
        ),
        ("- swap: {layers: [0, 1], at: norm}", "(swap): there is no field 'at'"),
        ("- scale: {factor: big, at: norm}", "factor must be a finite number, not 'big'"),
        ("- scale: {factor: true, at: norm}", "factor must be a finite number, not True"),
        ("- scale: {factor: .inf, at: norm}", "factor must be a finite number, not inf"),
        ("- scale: {factor: [1], at: norm}", "factor must be a finite number, not [1]"),
        (f"- scale: {{factor: 1{400 * '0'}, at: norm}}", "factor must be a finite number, not 1"),
        ("- scale: {factor: 1, at: norm, strength: .nan}", "strength must be a finite number, not nan"),
        ("- scale: {factor: 1, at: 3}", "at must be a pattern of sites such as '*.attn.o', or a list of them, not 3"),
        ("- scale: {factor: 1, at: []}", "at must be a pattern"),
        ("- scale: {factor: 1, at: [norm, 3]}", "at must be a pattern"),
        ("- truncate: {rank: 2.5, at: norm}", "rank must be a whole number, not 2.5"),
        ("- truncate: {rank: 0, at: norm}", "A rank is 1 or more; this is 0"),
        (
            "- remove: {direction: 3, at: norm}",
            "direction must name a .safetensors or .json file, or be a list of numbers, not 3",
        ),
        ("- remove: {direction: nowhere.json, at: norm}", "there is no file nowhere.json"),
        (
            "- remove: {direction: u.pt, at: norm}",
            "u.pt is no vector: a direction is read from a .safetensors or a .json file",
        ),
        ("- remove: {direction: [0, 0], at: norm}", "A direction is one finite, non-zero vector"),
        ("- remove: {direction: [1, .nan], at: norm}", "direction holds values that are NaN or infinite"),
        ("- remove: {direction: [1, a], at: norm}", "direction is not a list of numbers: [1, 'a']"),
        ("- swap: {layers: [0, 1, 2]}", "a swap is of two layers: swap: {layers: [3, 4]}"),
        ("- swap: {layers: {1: 2}}", "layers must be layer numbers, as in swap: {layers: [3, 4]}; found {1: 2}"),
        ("- swap: {layers: [1, 1]}", "Layer 1 swapped with itself changes nothing"),
        ("- swap: {layers: [1, two]}", "a layer must be a whole number, not 'two'"),
        ("- replace: {layers: [1], from: ./nowhere}", "nowhere is not a folder"),
        ("- replace: {layers: [1], from: 3}", "from must name a model: a folder, a hub id or 'specimen'; found 3"),
        ("- scale: {factor: 1, factor: 2, at: norm}", "is not YAML: a field is given twice, line 2"),
    ],
)
def test_each_mistake_is_one_clear_error(line, said):
    with pytest.raises((ValueError, OSError)) as raised:
        read_edits(f"edits:\n  {line}\n")
    assert said in str(raised.value)
    assert str(raised.value).startswith("the edit list")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n", "is not an edit list: it holds `edits:` and below it one edit a line"),
        ("- scale: {factor: 1, at: norm}\n", "is not an edit list"),
        ("edits: 3\n", "is not an edit list"),
        ("edits: []\n", "lists no edit. An edit is a line such as"),
        ("edits: []\nmore: 1\n", "is not an edit list"),
        ("edits: [\n", "is not YAML"),
        ("edits: !!python/object/apply:os.system ['true']\n", "is not YAML: could not determine a constructor"),
        ("edits: 2020-99-99\n", "is not"),
        ("edits: " + 5000 * "[" + "\n", "is not YAML"),
        ("? [a, [b]]\n: 1\n", "is not"),
        ("a: &a [*a]\nedits: *a\n", "is not"),
    ],
)
def test_what_is_no_list(text, said):
    with pytest.raises(ValueError) as raised:
        read_edits(text)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_short_list_of_aliases_stays_short():
    """Ten aliases of ten aliases of ...: 10**9 items to whoever writes them out."""
    lines = ["a0: &a0 [" + ", ".join("x" for _ in range(10)) + "]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    for last in ("edits: [{scale: *a8}]", "edits: [{scale: {factor: *a8, at: norm}}]", "edits: [*a8]"):
        with pytest.raises(ValueError, match="is not an edit list") as raised:
            read_edits("\n".join([*lines, last, ""]))
        assert len(str(raised.value)) < 500
    nested = "edits:\n  - scale:\n      at: norm\n      factor:\n        - &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    nested += "".join(f"        - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ValueError, match="factor must be a finite number") as raised:
        read_edits(nested)
    assert len(str(raised.value)) < 500


def test_files_that_are_no_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yml is not a file\. An edit list is a YAML file"):
        read_edits(tmp_path / "nowhere.yml")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_edits(str(tmp_path))
    (tmp_path / "long.yml").write_text("#" * (1 << 18) + "\n")
    with pytest.raises(ValueError, match="an edit list is a short YAML file"):
        read_edits(tmp_path / "long.yml")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.yml is not text"):
        read_edits(tmp_path / "bytes.yml")


def test_what_a_step_says_when_it_does_not_fit(base):
    for line, said in (
        ("scale: {factor: 1, at: '*.attn.z'}", r"edit 1 \(scale\): The pattern '\*\.attn\.z' matches no site"),
        (
            "remove: {direction: [1, 2], at: norm}",
            r"edit 1 \(remove\): norm is \(32,\) and cannot write a direction of length 2",
        ),
        (
            "add: {direction: [1, 2], at: 0.attn.o.bias}",
            r"edit 1 \(add\): .*This model has no bias at 0\.attn\.o\. AddDirection at 0\.attn\.o itself",
        ),
        ("swap: {layers: [0, 3]}", r"edit 1 \(swap\): There is no layer 3"),
    ):
        (step,) = read_edits(f"edits:\n  - {line}\n")
        with pytest.raises(ValueError, match=said):
            step(base)


def test_vectors(home, tmp_path):
    assert torch.equal(read_numbers(home / "directions" / "u.safetensors"), U)
    assert torch.equal(read_numbers(f"{home}/several.safetensors:v"), V)
    assert read_numbers(f"{home}/several.safetensors:u").dtype == torch.float32
    torch.testing.assert_close(read_numbers(home / "v.json"), V)
    (tmp_path / "bad.safetensors").write_bytes(b"short")
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "huge.json").write_text("[1e400]")
    (tmp_path / "folder.json").mkdir()
    save_file({"u": torch.tensor([float("inf")])}, tmp_path / "inf.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    for ref, said in (
        (home / "several.safetensors", r"holds 4 tensors \(.*\): say which, as in .*several\.safetensors:\w"),
        (f"{home}/several.safetensors:w", "has no tensor 'w'; it has"),
        (f"{home}/several.safetensors:two", r"two in .* is float32 of shape \(2, 2\): a direction is one vector"),
        (f"{home}/several.safetensors:n", r"n in .* is int64 of shape \(3,\)"),
        (tmp_path / "none.safetensors", "holds 0 tensors"),
        (tmp_path / "inf.safetensors", "u in .* holds values that are NaN or infinite"),
        (tmp_path / "bad.safetensors", "bad.safetensors"),
        (tmp_path / "bad.json", "bad.json is not JSON"),
        (tmp_path / "deep.json", "deep.json is not JSON"),
        (tmp_path / "object.json", "object.json is not a list of numbers"),
        (tmp_path / "huge.json", "NaN or infinite"),
        (tmp_path / "u.npy", "u.npy is no vector: .*; there is no such file or folder\\.$"),
        (tmp_path, "is no vector: .* or the folder of `surgery direction`\\.$"),
    ):
        with pytest.raises(ValueError, match=said):
            read_numbers(ref)
    for ref in (tmp_path / "absent.json", tmp_path / "folder.json", f"{tmp_path}/absent.safetensors:u"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_numbers(ref)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_lists_end_in_one_clear_error_or_in_edits(home, seed):
    generator = random.Random(seed)
    sound = "\n".join(line for line in LIST.splitlines() if "from:" not in line)  # those may ask the hub
    for _ in range(60):
        text = list(sound)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(len(text))
            match generator.randrange(3):
                case 0:
                    del text[at : at + generator.randint(1, 8)]
                case 1:
                    text[at:at] = generator.choices("{}[]:,-&*!|>%@'\"#? \n\t\0\x85é0e9.", k=generator.randint(1, 4))
                case 2:
                    text[at:at] = text[: generator.randrange(len(text))]
        (home / "damaged.yml").write_text("".join(text), encoding="utf-8")
        try:
            read_edits(home / "damaged.yml")
        except (ValueError, OSError) as error:
            said = str(error)
            assert said.startswith(str(home / "damaged.yml")), said
            assert len(said.splitlines()) == 1, said
            assert len(said) < 1000


# --- directions of the stream -----------------------------------------------------------------------------------------


def test_a_file_named_by_sites_is_a_direction_for_each_layer(home, base):
    directions = {Site(0, "mid"): U, Site(2, "mid"): U.flip(0)}
    (home / "brief").mkdir()
    for path in (home / "brief.safetensors", home / "brief" / "direction.safetensors"):
        save_file({str(site): vector.clone() for site, vector in directions.items()}, path)
        assert read_direction(path).keys() == directions.keys()
    expected = apply(RemoveDirection(directions, 0.5), base, ["0.attn.o.h1", "2.attn.o"])
    for name, file in (("brief.safetensors", "brief.safetensors"), ("brief", "brief/direction.safetensors")):
        (home / "brief.yml").write_text(
            f"edits:\n  - remove: {{direction: {name}, at: [0.attn.o.h1, 2.attn.o], strength: 0.5}}\n"
        )
        (step,) = read_edits(home / "brief.yml")
        assert step.files == (home / file,)
        assert all(torch.equal(step(base)[site], expected[site]) for site in base)
    (home / "brief.yml").write_text("edits:\n  - remove: {direction: brief, at: '*.attn.o'}\n")
    with pytest.raises(ValueError, match=r"brief.yml, edit 1 \(remove\): 1.attn.o needs the direction of its layer"):
        read_edits(home / "brief.yml")[0](base)


def test_one_vector_named_by_a_site_knows_a_norm_that_follows(home, tmp_path):
    save_file({"1.mid": U}, home / "one.safetensors")
    save_tiny("gemma2", tmp_path / "gemma2")
    point = Checkpoint(tmp_path / "gemma2")
    for name, removed in (("one.safetensors", {1: U}), ("directions/u.safetensors", U)):
        (home / "one.yml").write_text(f"edits:\n  - remove: {{direction: {name}, at: 1.attn.o}}\n")
        expected = apply(RemoveDirection(removed), point, "1.attn.o")["1.attn.o"]
        assert torch.equal(read_edits(home / "one.yml")[0](point)["1.attn.o"], expected)
    assert not torch.equal(expected, apply(RemoveDirection({1: U}), point, "1.attn.o")["1.attn.o"])


def test_what_is_no_direction_of_the_stream(home):
    for name, said in (
        ("directions/u.safetensors", "not named by sites"),
        ("several.safetensors", "sites such as 14.mid, but "),
    ):
        with pytest.raises(ValueError, match=said):
            read_direction(home / name)
    save_file({"0.mid": torch.ones(2, 2)}, home / "square.safetensors")
    with pytest.raises(ValueError, match=r"0.mid in .* a direction is one vector"):
        read_direction(home / "square.safetensors")
    with pytest.raises(FileNotFoundError):
        read_direction(home / "nowhere")

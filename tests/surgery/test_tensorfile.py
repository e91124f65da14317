"""One file of tensors: what is read is what was written, wherever in the file it lies and whoever wrote it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.tensorfile import TensorFile, TensorSink, hash_file_tensors, save_tensors

TENSORS = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "b": torch.arange(4),
    "c": torch.ones(2, dtype=torch.bool),
    "none": torch.empty(0, 3, dtype=torch.float16),
    "one": torch.tensor(2.5, dtype=torch.float64),
}
SAID = {"format": "pt", "about": "x"}


def same(path):
    file = TensorFile(path)
    for name, tensor in TENSORS.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)
        assert file[name].data_ptr() % tensor.element_size() == 0  # as torch takes for granted
    assert file.metadata == SAID


def with_header(path, change):
    """The same tensors under another header."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    text = change(raw[8:start])
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


@pytest.mark.parametrize("spaces", range(8))
def test_what_a_file_holds_does_not_depend_on_where_it_lies(spaces, tmp_path):
    save_tensors(tmp_path / "x", TENSORS, SAID)
    hashes = hash_file_tensors(tmp_path / "x")
    with_header(tmp_path / "x", lambda text: text + b" " * spaces)
    same(tmp_path / "x")
    assert hash_file_tensors(tmp_path / "x") == hashes


def test_nor_on_the_order_in_which_the_header_says_it(tmp_path):
    save_tensors(tmp_path / "x", TENSORS, SAID)
    hashes = hash_file_tensors(tmp_path / "x")

    def turned(text):
        said = json.loads(text)
        metadata = said.pop("__metadata__")
        return json.dumps(dict(reversed([("__metadata__", dict(reversed(metadata.items()))), *said.items()]))).encode()

    with_header(tmp_path / "x", turned)
    same(tmp_path / "x")
    assert hash_file_tensors(tmp_path / "x") == hashes


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata=SAID)
    same(tmp_path / "theirs")
    save_tensors(tmp_path / "ours", TENSORS, SAID)
    with TensorSink(tmp_path / "sink", TENSORS) as sink:
        sink.metadata = SAID
        for name, tensor in TENSORS.items():
            sink.add(name, tensor)
    for path in (tmp_path / "ours", tmp_path / "sink"):
        same(path)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # tensors can be mapped where they lie
        assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["n" * length for length in range(1, 9)])
def test_tensors_begin_where_they_can_be_mapped(name, tmp_path):
    save_tensors(tmp_path / "x", {name: torch.ones(2)}, {})
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0
    assert TensorFile(tmp_path / "x").metadata == {}


def test_a_sink_takes_each_name_once_and_no_more_words_than_it_has_room_for(tmp_path):
    with pytest.raises(ValueError, match="a is there already"), TensorSink(tmp_path / "x", ["a"]) as sink:  # noqa: PT012
        sink.add("a", torch.ones(2))
        sink.add("a", torch.ones(2))
    with (
        pytest.raises(ValueError, match=r"header of .* takes \d+ bytes; \d+ were kept"),
        TensorSink(tmp_path / "x", ["a"], room=8) as sink,
    ):
        sink.metadata["about"] = "x" * 400

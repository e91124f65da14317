"""Readers and hostile input: 2,000 damaged, lying and malicious files. Each either opens and is right, or is refused in one line.

Every batch runs in a forked process of its own, with a limit on its memory and a clock on every case: nothing hangs, nothing takes
the machine's memory, and no error comes out but the documented ones.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import yaml
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, save_delta
from surgery.edit_lists import read_edits
from surgery.headers import SIZES, CheckpointError, read_header
from surgery.lowrank import Adapter
from surgery.merging import RecipeError, read_recipe
from surgery.preflight import check_apply, check_model, check_recipe
from surgery.record import Record, RecordError, verify
from surgery.reverse import undo
from surgery.tensorfile import TensorFile
from surgery.weights import apply
from surgery.writing import write
from tests.families import save_tiny

INDEX = "model.safetensors.index.json"
DOCUMENTED = (
    CheckpointError,
    RecordError,
    RecipeError,
    ValueError,
    FileNotFoundError,
    FileExistsError,
)  # these, not their heirs
SECONDS = 1.0  # for one case
ROOM = 768 << 20  # bytes beyond what the process has before the first case

Case = Callable[[], object]


# --- running cases apart ------------------------------------------------------------------------------------------------------


def survive(cases: Iterator[tuple[str, Case]], expected: int, patience: float = 10 * SECONDS) -> None:
    """Run every case in a forked process; fail with what went wrong in the first few. patience: of the wall clock, for a busy machine."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            try:
                _child(cases, said.fileno(), patience)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        lines = said.read().decode().splitlines()
    assert status == 0, f"the process died with {status} after {len(lines)} lines: {lines[-3:]}"
    assert lines, "nothing was said"
    assert lines[-1] == f"done {expected}", lines[:10]
    assert len(lines) == 1, "\n".join(lines[:6])


def _child(cases: Iterator[tuple[str, Case]], out: int, patience: float) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    jaxtyping.config.update("jaxtyping_disable", True)  # so that bad input reaches the error a user sees
    signal.signal(signal.SIGALRM, _too_long)
    count = 0
    for name, case in cases:
        count += 1
        wrong = _judge(case, patience)
        if wrong:
            os.write(out, f"{name}: {wrong}\n".encode("ascii", "backslashreplace"))
    os.write(out, f"done {count}\n".encode())


class _TooLong(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLong


def _judge(case: Case, patience: float) -> str | None:
    signal.setitimer(signal.ITIMER_REAL, patience)
    began = time.thread_time()
    try:
        case()
    except _TooLong:
        return "hangs"
    except DOCUMENTED as error:
        if type(error) not in DOCUMENTED:
            return f"{type(error).__name__}: {error}".replace("\n", " ")
        if "\n" in str(error) or not str(error) or len(str(error)) > 1500:
            return f"no clear line: {str(error)[:300]!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.filename}:{where.lineno}: {str(error)[:200]}".replace("\n", " ")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.thread_time() - began > SECONDS:
        return f"takes {time.thread_time() - began:.1f} s"
    return None


# --- damage -------------------------------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -0.0, float("nan"), float("inf"), 0.5, "", " ",
    "x" * 3000, "../x", "/etc/passwd", "..", "\x00", "a\nb", "\u202e\u200b", "ünïcödé 語", "\ud800", "-1", "1e999", "NaN", "null", [], {}, [[]],
    [1, 2], ["a"], [None], {"": ""}, {"a": 1}, [[[[[[[[[[]]]]]]]]]], list(range(300)), "{l}", "(a+)+$", "%s%n", "base", "model",
]  # fmt: skip


def bytes_damaged(raw: bytes, dice: random.Random) -> bytes:
    """Some bytes flipped, cut, put in twice, moved, or replaced by what parsers dislike."""
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 5, 30))):
        at = dice.randrange(len(data) + 1)
        span = dice.choice((1, 2, 8, 40))
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + span]
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                data[at:at] = dice.randbytes(span)
            case _:
                word = dice.choice(
                    [
                        b"[" * 5000,
                        b"{" * 200,
                        b"99999999999999999999",
                        b"NaN",
                        b"\xff\xfe",
                        b'"',
                        b"}",
                        b"\x00",
                        b"-",
                        b"1e999",
                        b"\xed\xa0\x80",
                    ]
                )
                data[at : at + len(word) * dice.randrange(2)] = word
    return bytes(data)


def tree_damaged(tree: Any, dice: random.Random) -> Any:
    """One or more values of a JSON tree replaced by nasty ones, removed, or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        spots: list[tuple[Any, Any]] = []
        stack = [tree]
        while stack:
            node = stack.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], dict | list):
                    stack.append(node[key])
        if not spots:
            return dice.choice(NASTY)
        node, key = dice.choice(spots)
        match dice.randrange(5):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(dice.choice(NASTY))[:50]] = node.pop(key)
            case _:
                node[key] = copy.deepcopy(dice.choice(NASTY))
    return dice.choice(NASTY) if dice.random() < 0.02 else tree


def as_text(tree: Any, dice: random.Random) -> bytes:
    """JSON of a tree, now and then with a key there twice, or damaged once more."""
    text = json.dumps(tree, ensure_ascii=dice.random() < 0.9)
    if dice.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    raw = text.encode("utf-8", "surrogatepass")
    return bytes_damaged(raw, dice) if dice.random() < 0.15 else raw


def with_header(header: bytes, data: bytes, dice: random.Random) -> bytes:
    length = (
        len(header) if dice.random() < 0.9 else dice.choice((0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1, 10**8 + 1))
    )
    return length.to_bytes(8, "little") + header + data


def split(path: Path) -> tuple[Any, bytes]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def tensors_damaged(path: Path, dice: random.Random) -> bytes:
    """A safetensors file with damage anywhere, or lies in its header."""
    if dice.random() < 0.4:
        return bytes_damaged(path.read_bytes(), dice)
    header, data = split(path)
    entries = [e for e in header.values() if "shape" in e]
    lies: list[Callable[[], Any]] = [
        lambda: None,
        lambda: entries[0].update(shape=[dice.choice((2**31, 2**62, 10**15))] * dice.choice((1, 2, 4))),
        lambda: entries[0].update(
            data_offsets=dice.choice(([0, 2**62], [-8, 0], [8, 0], [0, len(data)], [len(data), len(data)]))
        ),
        lambda: entries[-1].update(data_offsets=entries[0]["data_offsets"]),
        lambda: entries[0].update(dtype=dice.choice(("F99", "f32", "", "F64", "I8", "BOOL"))),
        lambda: entries[0].update(shape=[*entries[0]["shape"], 1]),
        lambda: header.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
    ]
    if entries and dice.random() < 0.7:
        dice.choice(lies)()
    else:
        header = tree_damaged(header, dice)
    return with_header(as_text(header, dice), data, dice)


# --- what is damaged ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sharded and single: llamas; delta, adapter, written (with its record and way back), recipe, edits."""
    import transformers  # noqa: F401 - before the fork, so that no case waits for it

    home = tmp_path_factory.mktemp("hostile")
    save_tiny("llama", home / "sharded", dtype=torch.bfloat16, shards=3)
    save_tiny("llama", home / "single", dtype=torch.bfloat16, seed=1)
    base, tuned = Checkpoint(home / "sharded"), Checkpoint(home / "single")
    save_delta(0.1 * (tuned - base).keep("*.mlp.*"), home / "delta", base_hash=base.hash())
    written = write(apply(lambda _, W: W * 1.5, base, "1.attn.o"), home / "written")
    record = Record("edit", {"model": "x"})
    record.inputs, record.checks = {"model": {"ref": "x", "hash": written.base_hash}}, written.checks
    record.save(home / "written")
    (home / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {}, "alpha_pattern": {"q_proj": 8},
                "base_model_name_or_path": "single", "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}  # fmt: skip
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    pairs = {}
    for layer in range(3):
        for module, rows, columns in (("self_attn.q_proj", 48, 32), ("mlp.down_proj", 32, 40)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            pairs[f"{name}.lora_A.weight"], pairs[f"{name}.lora_B.weight"] = torch.ones(2, columns), torch.ones(rows, 2)
    save_file(pairs, home / "adapter" / "adapter_model.safetensors")
    return home


@pytest.fixture
def home(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(store, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    return tmp_path / "x"


def damaged(
    path: Path, make: Callable[[random.Random], bytes], then: Case, count: int, seed: int
) -> Iterator[tuple[str, Case]]:
    """`count` versions of a file, each with what should be done about it; the file itself comes back at the end."""
    original = path.read_bytes()
    for i in range(count):

        def case(i: int = i) -> object:
            path.write_bytes(make(random.Random(f"{seed} {i}")))
            return then()

        yield f"{path.name} {i}", case
    path.write_bytes(original)


def opens_right(folder: Path) -> None:
    """A checkpoint that opens reads every tensor, with the shape it says."""
    checkpoint = Checkpoint(folder)
    for site, shape in checkpoint.shapes().items():
        assert checkpoint[site].shape == shape, site


def looks(check: Callable[[], Any]) -> None:
    """A preflight never raises: whatever it meets is a line in its report."""
    report = check()
    assert str(report)
    json.dumps(report.as_dict())
    for problem in report.problems:
        assert problem.found
        assert problem.fix
        assert "\n" not in problem.found, problem.found


def test_headers(home: Path) -> None:
    path = home / "single" / "model.safetensors"

    def read() -> None:
        entries, metadata = read_header(path)
        at = path.stat().st_size - sum(e.end - e.begin for e in entries)
        for entry in entries:  # no gap, no overlap, nothing beyond the end
            assert entry.begin == at
            at = entry.end
            size = SIZES[entry.code]
            for n in entry.shape:
                size *= n
            assert size == entry.end - entry.begin
        assert at == path.stat().st_size
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items())
        file = TensorFile(path)
        for name, tensor in file.tensors.items():
            assert file[name].shape == tensor.shape

    survive(damaged(path, lambda dice: tensors_damaged(store_file(home), dice), read, 500, 1), 500)


def store_file(home: Path) -> Path:
    """A small safetensors file to damage, beside the folder it goes into."""
    small = home / "small.safetensors"
    if not small.exists():
        save_file(
            {"a": torch.ones(3, 4), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.ones(())},
            small,
            metadata={"format": "pt"},
        )
    return small


def test_weights_of_a_folder(home: Path) -> None:
    path = home / "single" / "model.safetensors"
    shutil.copy(path, home / "whole.safetensors")

    def both() -> None:
        looks(lambda: check_model("single"))
        opens_right(home / "single")

    survive(damaged(path, lambda dice: tensors_damaged(home / "whole.safetensors", dice), both, 150, 2), 150)


def test_indices(home: Path) -> None:
    path = home / "sharded" / INDEX
    tree = json.loads(path.read_text())

    def both() -> None:
        looks(lambda: check_model("sharded"))
        opens_right(home / "sharded")

    survive(damaged(path, lambda dice: as_text(tree_damaged(tree, dice), dice), both, 200, 3), 200)


def test_configs(home: Path) -> None:
    path = home / "single" / "config.json"
    tree = json.loads(path.read_text())

    def both() -> None:
        looks(lambda: check_model("single"))
        opens_right(home / "single")

    survive(damaged(path, lambda dice: as_text(tree_damaged(tree, dice), dice), both, 350, 4), 350)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(home: Path, name: str) -> None:
    path = home / "single" / name
    tree = json.loads(path.read_text())
    tree["chat_template"] = [{"name": "default", "template": "x"}]
    survive(
        damaged(
            path,
            lambda dice: as_text(tree_damaged(tree, dice), dice),
            lambda: looks(lambda: check_model("single")),
            50,
            5,
        ),
        50,
    )


def test_recipes(home: Path) -> None:
    models = [{"model": "sharded", "parameters": {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}},
              {"model": "single", "parameters": {"weight": [0.1, 0.9]}}]  # fmt: skip
    sliced = [{"sources": [{"model": m, "layer_range": [0, 3]} for m in ("sharded", "single")]}]
    trees = [
        {"merge_method": "ties", "base_model": "sharded", "models": models, "parameters": {"normalize": True}, "dtype": "bfloat16", "tokenizer_source": "base"},
        {"merge_method": "slerp", "base_model": "sharded", "slices": sliced, "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}},
    ]  # fmt: skip
    path = home / "recipe.yml"
    path.write_text(yaml.safe_dump(trees[0]))

    def make(dice: random.Random) -> bytes:
        text = yaml.safe_dump(tree_damaged(dice.choice(trees), dice), allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )
        return bytes_damaged(text, dice) if dice.random() < 0.4 else text

    def both() -> None:
        looks(lambda: check_recipe("recipe.yml"))
        read_recipe(path)

    read_recipe(path)  # what it imports is not a case's time
    survive(damaged(path, make, both, 250, 6), 250)


def test_edit_lists(home: Path) -> None:
    tree = {"edits": [
        {"remove": {"direction": [1.0] * 8, "at": "*.attn.o", "strength": 0.5}}, {"scale": {"factor": 0.5, "at": ["0.attn.o.h1", "1.mlp.*"]}},
        {"truncate": {"rank": 2, "at": "2.mlp.up"}}, {"swap": {"layers": [0, 2]}},
    ]}  # fmt: skip
    path = home / "edits.yml"
    path.write_text("")

    def make(dice: random.Random) -> bytes:
        text = yaml.safe_dump(tree_damaged(tree, dice), allow_unicode=True).encode("utf-8", "surrogatepass")
        return bytes_damaged(text, dice) if dice.random() < 0.4 else text

    def read() -> None:
        base = Checkpoint(home / "single")
        for step in read_edits(path):
            step(base)

    survive(damaged(path, make, read, 150, 7), 150)


def test_deltas(home: Path) -> None:
    path = home / "delta" / "delta.safetensors"
    shutil.copy(path, home / "whole.safetensors")

    def both() -> None:
        looks(lambda: check_apply("sharded", ["delta"]))
        vector = StoredDelta(home / "delta")
        for site, shape in vector.shapes().items():
            assert vector[site].shape == shape
            assert vector.rows(site, slice(0, 2)).shape[1:] == shape[1:]

    survive(damaged(path, lambda dice: tensors_damaged(home / "whole.safetensors", dice), both, 200, 8), 200)


def test_adapters(home: Path) -> None:
    base = Checkpoint(home / "single")

    def both() -> None:
        looks(lambda: check_apply("single", ["adapter"]))
        adapter = Adapter(home / "adapter", base)
        for site, shape in adapter.shapes().items():
            assert adapter[site].shape == shape == base.shape(site)

    config = home / "adapter" / "adapter_config.json"
    tree = json.loads(config.read_text())
    survive(damaged(config, lambda dice: as_text(tree_damaged(tree, dice), dice), both, 120, 9), 120)
    path = home / "adapter" / "adapter_model.safetensors"
    shutil.copy(path, home / "whole.safetensors")
    survive(damaged(path, lambda dice: tensors_damaged(home / "whole.safetensors", dice), both, 120, 10), 120)


def test_records_and_the_way_back(home: Path) -> None:
    folder = home / "written"
    record = folder / "record.json"
    tree = json.loads(record.read_text())

    def read() -> None:
        Record.load(folder)
        verify(folder)

    survive(damaged(record, lambda dice: as_text(tree_damaged(tree, dice), dice), read, 100, 11), 100)
    patch = folder / "undo.patch"
    shutil.copy(patch, home / "whole.safetensors")

    def back() -> None:
        try:
            undo(folder, home / "back")
        finally:
            shutil.rmtree(home / "back", ignore_errors=True)
            assert sorted(p.name for p in home.glob("*back*")) == []

    survive(damaged(patch, lambda dice: tensors_damaged(home / "whole.safetensors", dice), back, 60, 12), 60)


# --- malice, by name ----------------------------------------------------------------------------------------------------------


def refused(read: Case, *words: str) -> None:
    """In one line with these words, at once, and with next to no memory."""

    def case() -> None:
        with pytest.raises(DOCUMENTED) as error:
            read()
        for word in words:
            assert word in str(error.value), str(error.value)
        raise error.value

    survive(iter([("case", case)]), 1)


def test_files_that_are_no_files(home: Path) -> None:
    shard = home / "sharded" / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    refused(lambda: Checkpoint(home / "sharded"), shard.name, "a pipe or device")
    refused(lambda: TensorFile(shard), shard.name, "a pipe or device")
    shard.unlink()
    shard.mkdir()
    refused(lambda: Checkpoint(home / "sharded"), shard.name, "a folder")
    for name in ("config.json", INDEX, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        path = home / "single" / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        survive(iter([(name, lambda: looks(lambda: check_model("single")))]), 1)
        survive(iter([(name, lambda: Checkpoint(home / "single"))]), 1)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    for folder, name, read in (
        ("delta", "delta.safetensors", lambda: StoredDelta(home / "delta")),
        ("adapter", "adapter_model.safetensors", lambda: Adapter(home / "adapter", Checkpoint(home / "single"))),
        ("adapter", "adapter_config.json", lambda: Adapter(home / "adapter", Checkpoint(home / "single"))),
        ("written", "record.json", lambda: Record.load(home / "written")),
        ("written", "undo.patch", lambda: undo(home / "written", home / "back")),
    ):
        path = home / folder / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(read, folder)
        path.unlink()
        path.write_bytes(kept)
    os.mkfifo(home / "pipe.yml")
    refused(lambda: read_recipe(home / "pipe.yml"), "pipe.yml")
    refused(lambda: read_edits(home / "pipe.yml"), "pipe.yml")
    survive(iter([("pipe", lambda: looks(lambda: check_recipe("pipe.yml")))]), 1)
    os.mkfifo(home / "written" / "extra")
    survive(iter([("pipe", lambda: verify(home / "written"))]), 1)


def test_links_out_of_the_folder(home: Path) -> None:
    secret = home / "secret.txt"
    secret.write_text("nobody's business")
    for name in ("notes.txt", "config.json", "model.safetensors", "chat_template.jinja"):
        path = home / "single" / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
        refused(
            lambda: write(Checkpoint(home / "single"), home / "out"), name, "is a link out of the folder", str(secret)
        )
        assert not (home / "out").exists()
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    ring = home / "single" / "ring.json"
    ring.symlink_to(ring)
    refused(lambda: Checkpoint(home / "single"), "ring.json", "is a link")
    ring.unlink()
    for folder, name, read in (
        ("delta", "delta.safetensors", lambda: StoredDelta(home / "delta")),
        ("adapter", "adapter_model.safetensors", lambda: Adapter(home / "adapter", Checkpoint(home / "single"))),
    ):
        path = home / folder / name
        path.rename(home / name)
        path.symlink_to(home / name)
        refused(read, name, "is a link out of the folder")


def test_pickles_under_another_name(home: Path) -> None:
    path = home / "single" / "model.safetensors"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(home / "opened"),))

    for raw in (pickle.dumps(Evil()), pickle.dumps(Evil(), protocol=2)):
        path.write_bytes(raw + b"\0" * 64)
        refused(
            lambda: Checkpoint(home / "single"), "is a pickle under a safetensors name", "save_pretrained(NEW_FOLDER)"
        )
    torch.save({"a": torch.ones(3)}, path)
    refused(lambda: Checkpoint(home / "single"), "is a pickle under a safetensors name")
    assert not (home / "opened").exists()


def test_bombs(home: Path) -> None:
    config = home / "single" / "config.json"
    tree = json.loads(config.read_text())
    for key, value in (
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**9),
        ("num_attention_heads", 10**12),
        ("vocab_size", 10**15),
        ("head_dim", 2**62),
    ):
        config.write_text(json.dumps(tree | {key: value}))
        survive(
            iter([(key, lambda: Checkpoint(home / "single")), (key, lambda: looks(lambda: check_model("single")))]), 2
        )
    config.write_text("[" * 200_000)
    refused(lambda: Checkpoint(home / "single"), "config.json")
    config.write_text('{"a": ' * 100_000)
    refused(lambda: Checkpoint(home / "single"), "config.json")
    with config.open("wb") as file:
        file.truncate(10**12)  # a hole: a terabyte that costs nothing to make
    refused(lambda: Checkpoint(home / "single"), "config.json", "more than any such file")
    config.write_text(json.dumps(tree))
    with (home / "sharded" / INDEX).open("wb") as file:
        file.truncate(10**12)
    refused(lambda: Checkpoint(home / "sharded"), "index")
    with (home / "written" / "record.json").open("wb") as file:
        file.truncate(10**12)
    refused(lambda: Record.load(home / "written"), "record.json")
    for name, read in (
        ("recipe.yml", lambda: read_recipe(home / "recipe.yml")),
        ("edits.yml", lambda: read_edits(home / "edits.yml")),
    ):
        with (home / name).open("wb") as file:
            file.truncate(10**12)
        refused(read, name)
        lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)
        ]
        (home / name).write_text("\n".join(lines))
        refused(read)
    settings = home / "adapter" / "adapter_config.json"
    said = json.loads(settings.read_text())
    base = Checkpoint(home / "single")
    for pattern in ("(.*)*x", "((a+)+)+$", "(.+)+q"):
        settings.write_text(json.dumps(said | {"alpha_pattern": {pattern: 3}}))
        survive(iter([(pattern, lambda: Adapter(home / "adapter", base))]), 1)


def test_a_way_back_leads_nowhere_else(home: Path) -> None:
    """Names in a reverse patch are files of the folder, whatever they say."""
    from surgery.reverse import PATCH, _digest

    patch, folder = TensorFile(home / "written" / PATCH), home / "evil"
    for evil in (
        "side:../outside.txt",
        f"side:{home / 'outside.txt'}",
        "header:../outside.txt",
        "side:",
        "side:..",
        "side:sub/x",
    ):
        tensors = {name: patch[name].clone() for name in patch.tensors} | {evil: torch.zeros(4, dtype=torch.uint8)}
        shutil.copytree(home / "written", folder)
        save_file(tensors, folder / PATCH, metadata=patch.metadata)
        again = TensorFile(folder / PATCH)
        save_file(
            tensors,
            folder / PATCH,
            metadata={**patch.metadata, "content": _digest(again[name] for name in again.tensors)},
        )
        refused(lambda: undo(folder, home / "deep" / "back"), PATCH)
        assert not (home / "deep" / "back").exists()
        assert not list(home.rglob("outside.txt"))
        shutil.rmtree(folder)


def test_the_unharmed_are_still_read(home: Path) -> None:
    """That the cases above are refused for what was done to them."""

    def all_of_them() -> None:
        for name in ("single", "sharded", "written"):
            opens_right(home / name)
            assert check_model(name).problems == ()
        assert len(StoredDelta(home / "delta")) == 12
        assert len(Adapter(home / "adapter", Checkpoint(home / "single"))) == 6
        assert verify(home / "written") == []
        assert undo(home / "written", home / "back") == Checkpoint(home / "sharded").hash()

    survive(iter([("all", all_of_them)]), 1)


def test_the_watch_sees_what_it_should() -> None:
    """A hang, a bomb, another exception, a death and a silent loss are all noticed."""

    def endless() -> None:
        while True:
            pass

    def greedy() -> list[bytearray]:
        return [bytearray(1 << 28) for _ in range(100)]

    def wrong() -> None:
        raise KeyError("x")

    def unclear() -> None:
        raise ValueError("two\nlines")

    def heir() -> None:
        json.loads("{")

    for case in (
        endless,
        greedy,
        wrong,
        unclear,
        heir,
        lambda: os._exit(3),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
    ):
        with pytest.raises(AssertionError):
            survive(iter([("case", case)]), 1, patience=0.5)
    with pytest.raises(AssertionError):
        survive(iter([("case", lambda: None)]), 2)
    survive(iter([("case", lambda: None)]), 1)

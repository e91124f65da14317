"""Receipts. Every output folder holds ``record.json``: what ran, on what, from which code, with which seeds, and what came out.

`verify` hashes the outputs again and names the tensor that differs; `replay` runs the command again into a new folder, compares,
and says how today's environment differs from the recorded one.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from surgery.hashing import Digest, hash_file
from surgery.headers import RECORD as RECORD
from surgery.headers import read_json
from surgery.whole import write_whole

PACKAGES = (
    "model-surgery",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "mergekit",
    "peft",
    "trl",
    "accelerate",
    "numpy",
    "scikit-learn",
    "reasoning-gym",
    "math-verify",
)
Grade = Literal["low", "medium", "high"]


_KINDS = {
    "command": str, "arguments": dict, "typed": list, "inputs": dict, "seeds": dict, "checks": list, "results": dict, "outputs": dict,
    "environment": dict, "started": str, "ran_in": str,
}  # fmt: skip


class RecordError(ValueError):
    """A folder without a readable record, or outputs that contradict it."""


@dataclass
class Record:
    """What ran.

    command:   name of the command, as on the command line.
    arguments: every argument, resolved. typed: the words as typed.
    inputs:    role -> {"ref": as given, "hash": of what it was}.
    seeds:     name -> seed. checks: what was verified, in words. results: the figures worth keeping.
    outputs:   file -> BLAKE3; a safetensors file maps each of its tensors to a BLAKE3.
    hash:      which hash that is, so that no other is taken for it.
    ran_in:    the folder that relative paths are relative to, as seen from the record's own.
    """

    command: str
    arguments: dict[str, Any]
    typed: list[str] = field(default_factory=list)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str | dict[str, str]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    hash: str = "BLAKE3"
    ran_in: str = ""

    def __post_init__(self) -> None:
        self._clock = time.monotonic() - self.seconds
        self._here = None if self.started else Path.cwd()
        if not self.started:
            self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.environment = environment()

    def save(self, folder: str | os.PathLike[str], reproducible: Sequence[str] = ("*",)) -> Path:
        """Hash the folder's files and write the record beside them. `reproducible`: patterns of the files `replay` will compare."""
        folder = Path(folder)
        self.seconds = round(time.monotonic() - self._clock, 3)
        self.outputs = hash_folder(folder)
        if self._here:
            self.ran_in = os.path.relpath(self._here, folder.resolve())
        self.results.setdefault("reproducible", list(reproducible))
        return write_whole(folder / RECORD, json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Record:
        """The record of a folder. Raises RecordError where there is no such folder, or none in it, and for one that is damaged."""
        path = Path(folder) / RECORD
        if not path.parent.exists():
            raise RecordError(
                f"There is no folder {folder}: nothing to compare. Give the folder of a surgery command's output."
            )
        if not path.is_file():
            raise RecordError(
                f"{folder} has no {RECORD}: it was not made by a surgery command, the command did not finish, or `surgery undo` gave it back "
                "as it was before there was one."
            )
        try:
            said = read_json(path)
            wrong = [name for name, kind in _KINDS.items() if not isinstance(said.get(name, kind()), kind)]
            if wrong:
                raise TypeError(f"{wrong[0]} is no {_KINDS[wrong[0]].__name__}")
            if not isinstance(said.get("environment", {}).get("packages", {}), dict):
                raise TypeError("packages is no dict")
            for role, entry in said.get("inputs", {}).items():
                if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("ref", "hash")):
                    raise TypeError(f"the input {role} has no ref and hash")
            return cls(**{"hash": "SHA-256", **said})  # records once said nothing of it
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError(f"{path} is damaged: {str(error)[:300]}") from error

    def require_comparable(self) -> None:
        """Raise RecordError where the outputs are known by a hash that this version does not take."""
        if self.hash != type(self).hash:
            raise RecordError(
                f"The record of this {self.command} knows its outputs by {self.hash}, and this version knows files by {type(self).hash}: they "
                "cannot be compared. Run the command again."
            )


@dataclass(frozen=True)
class Replayed:
    """How a replay compares: files equal to the recorded ones, files that differ, and what is different about the environment."""

    folder: Path
    equal: list[str]
    differing: list[str]
    environment: list[tuple[Grade, str]]

    @property
    def ok(self) -> bool:
        return not self.differing


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """What differs from the record, in words: changed tensors or files, missing ones, extra ones. Empty when all is as recorded."""
    record = Record.load(folder)
    record.require_comparable()
    recorded = record.outputs
    found = hash_folder(Path(folder))
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [f"{name} is not in the record" for name in found if name not in recorded]
    for name in recorded.keys() & found.keys():
        problems += _differences(name, recorded[name], found[name])
    return sorted(problems)


def replay(
    folder: str | os.PathLike[str], to: str | os.PathLike[str], commands: Mapping[str, Callable[..., object]]
) -> Replayed:
    """Run the recorded command again, into `to`, and compare the outputs. Where relative paths lead nowhere from here, it runs where it ran before.

    `commands` maps a command's name to the function behind it. Raises RecordError when an input's hash cannot be what it was, and for
    a command or an option that is not known any more.
    """
    import fnmatch

    record = Record.load(folder)
    record.require_comparable()
    if record.command not in commands:
        raise RecordError(
            f"The record's command is {record.command!r}; this version knows {', '.join(sorted(commands))}."
        )
    command, arguments = commands[record.command], {**record.arguments, "to": Path(to)}
    unknown = [name for name in arguments if name not in inspect.signature(command).parameters]
    if unknown:
        raise RecordError(
            f"The record was made by a version whose {record.command!r} knew {', '.join(unknown)}; this one's does not. Replay it with that "
            "version, or run the command anew."
        )
    try:
        inspect.signature(command).bind(**arguments)
    except TypeError as error:
        raise RecordError(f"The record in {folder} is damaged: its {record.command!r} has {error}.") from error
    patterns = record.results.get("reproducible")
    if not isinstance(patterns, list):
        raise RecordError(f"The record in {folder} is damaged: it does not say which outputs are the same each time.")
    before = (Path(folder).resolve() / record.ran_in).resolve() if record.ran_in else None
    where = "replay it from the folder in which the command ran" + (f", {before}." if before else ".")
    try:
        command(**arguments)
    except FileNotFoundError as error:
        missing = RecordError(f"{error} The record's paths are as they were typed: {where}")
        if before is None or not before.is_dir() or before == Path.cwd():
            raise missing from error
        arguments["to"] = to = Path(to).absolute()
        try:
            with chdir(before):
                command(**arguments)
        except FileNotFoundError:
            raise missing from error
    again = Record.load(to)
    changed = [role for role, was in record.inputs.items() if again.inputs.get(role, {}).get("hash") != was["hash"]]
    if changed:
        raise RecordError(
            f"The input {changed[0]} ({record.inputs[changed[0]]['ref']}) is not what it was when this was recorded: its hash differs. "
            f"If another one was meant, {where}"
        )
    equal, differing = [], []
    for name, was in record.outputs.items():
        if any(fnmatch.fnmatch(name, p) for p in patterns):
            differences = _differences(name, was, again.outputs.get(name, "missing"))
            (differing if differences else equal).append(differences[0] if differences else name)
    changes = compare_environment(record.environment, environment(), record.command)
    return Replayed(Path(to), equal, differing, changes)


def environment() -> dict[str, Any]:
    """What a result may depend on beside its arguments: versions, processor, threads."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "source": source_hash(),
    }


def processor() -> str:
    """The processor by its name: products in bf16 are summed in another order on another one."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.exists() else ()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def source_hash() -> str:
    """BLAKE3 of the toolkit's own source, tables included: a result never loses its code."""
    digest = Digest()
    root = Path(__file__).parent.parent
    for package in ("surgery", "probes", "finetune", "analyses"):
        for path in sorted(p for p in (root / package).rglob("*") if p.suffix in (".py", ".toml")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compare_environment(then: Mapping[str, Any], now: Mapping[str, Any], command: str = "") -> list[tuple[Grade, str]]:
    """What changed since the record, gravest first: ``high`` changes numbers, ``medium`` may, ``low`` changes their last digits.

    command: whose record it is; the rules of a merge are mergekit's.
    """
    gravest = {"torch", "transformers", *(["mergekit"] if command == "merge" else [])}
    grades: dict[str, Grade] = {
        "device": "high",
        "source": "high",
        "processor": "medium",
        "python": "low",
        "platform": "low",
        "threads": "low",
    }
    found: list[tuple[Grade, str]] = [
        (grade, f"{key}: {_short(then.get(key))} then, {_short(now.get(key))} now")
        for key, grade in grades.items()
        if then.get(key) != now.get(key)
    ]
    for package, was in then.get("packages", {}).items():
        today = now["packages"].get(package)
        if was != today:
            found.append(("high" if package in gravest else "medium", f"{package}: {was} then, {today} now"))
    return sorted(found, key=lambda item: ("high", "medium", "low").index(item[0]))


def hash_folder(folder: Path) -> dict[str, str | dict[str, str]]:
    """File (relative) -> BLAKE3; for a safetensors file, tensor -> BLAKE3. The record itself and unfinished files are left out."""
    from surgery.tensorfile import hash_file_tensors

    found: dict[str, str | dict[str, str]] = {}
    for path in sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name != RECORD and ".partial" not in str(p.relative_to(folder))
    ):
        name = path.relative_to(folder).as_posix()
        found[name] = hash_file_tensors(path) if path.suffix == ".safetensors" else hash_file(path)
    return found


def typed() -> list[str]:
    """The words of the command line, the program's own name without its folder."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _differences(name: str, was: str | dict[str, str], now: str | dict[str, str]) -> list[str]:
    if was == now:
        return []
    if isinstance(was, dict) and isinstance(now, dict):
        tensors = sorted(t for t in was.keys() | now.keys() if was.get(t) != now.get(t))
        return [f"{name}: tensor {t} differs" for t in tensors]
    return [f"{name} differs" if now != "missing" else f"{name} is missing"]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text

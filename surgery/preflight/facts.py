"""One folder, as its configuration, tokenizer files and headers describe it, and what is wrong with it by itself."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from surgery.adapter_config import lora_pair, read_adapter_config, unusable
from surgery.adapter_names import CONFIG, WEIGHTS, Names, split_key
from surgery.hashing import hash_bytes, hash_file
from surgery.headers import (
    DELTA,
    DELTA_FORMAT,
    MAX_JSON,
    RECORD,
    SIZES,
    CheckpointError,
    Entry,
    Fault,
    read_config,
    read_folder,
    read_header,
    read_json,
    stray_links,
    two_heads,
)
from surgery.hub_ids import download_words, hub_id

if TYPE_CHECKING:
    from surgery.anatomy import Anatomy

Severity = Literal["error", "warning", "note"]
MEANT = "Did you mean"
SHORT = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_ALIASES = {  # GPT-2 and its kin keep the old names in config.json
    "hidden_size": ("n_embd",), "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions", "n_ctx"), "intermediate_size": ("n_inner", "ffn_dim"),
}  # fmt: skip
_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|weight_packed|weight_scale|weight_format|absmax|SCB|quant_state\..*)$"
)
_UNTIED_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class Problem:
    """Something that is or may go wrong.

    severity: ``error``, the command would fail or write garbage; ``warning``, it may; ``note``, good to know.
    kind: one word. where: the file, site or key. found: what is there. fix: what to do.
    """

    severity: Severity
    kind: str
    where: str
    found: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("where", "found", "fix"):  # one line each, whatever was in the file
            object.__setattr__(self, name, in_one_line(getattr(self, name)))


@dataclass(frozen=True)
class Place:
    """Where the files of a model or adapter are. sizes: in bytes, of files of which no more than the header, or nothing, is in the folder."""

    folder: Path
    sizes: Mapping[str, int] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """Bytes of a file in the folder, all of it."""
        return self.sizes[name] if name in self.sizes else (self.folder / name).stat().st_size


@dataclass(frozen=True)
class Facts:
    """A model folder, at its place.

    config: the raw config.json; text: its language model's part. vocabulary: token -> id, from tokenizer.json (or vocab.json).
    anatomy: None where the family is unknown or the tensors contradict the config.
    """

    ref: str
    place: Place
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Entry] = field(default_factory=dict)
    anatomy: Anatomy | None = None
    tokenizer_hash: str | None = None
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    template: str | None = None

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def text(self) -> Mapping[str, Any]:
        inner = next(
            (self.config[k] for k in ("text_config", "llm_config") if isinstance(self.config.get(k), dict)), {}
        )
        return {**self.config, **inner}

    def get(self, key: str) -> Any:
        """A value of the language model's config under its usual name, None where config.json leaves it to the class."""
        names = (key, *_ALIASES.get(key, ()))
        return next((self.text[n] for n in names if self.text.get(n) is not None), None)

    @property
    def family(self) -> str:
        return str(self.get("model_type"))

    @property
    def tied(self) -> bool | None:
        """What config.json says of the tie, or, where it says nothing, whether a head is absent; None with no tensor to go by."""
        for said in (self.config.get("tie_word_embeddings"), self.get("tie_word_embeddings")):
            if isinstance(said, bool):
                return said
        return not any(n.endswith(_UNTIED_HEADS) for n in self.tensors) if self.tensors else None

    @property
    def nbytes(self) -> int:
        return sum(t.end - t.begin for t in self.tensors.values())

    @property
    def dtypes(self) -> Counter[str]:
        """Bytes by dtype code."""
        found: Counter[str] = Counter()
        for tensor in self.tensors.values():
            found[tensor.code] += tensor.end - tensor.begin
        return found

    def rows(self) -> int | None:
        """Rows of the input embedding."""
        name = self.name_of("embed")
        return self.tensors[name].shape[0] if name and self.tensors[name].shape else None

    def name_of(self, part: str) -> str | None:
        """The file's name for the tensor at a site outside the layers."""
        if self.anatomy is None:
            endings = {"embed": ("embed_tokens.weight", "wte.weight", "embed_in.weight"), "head": _UNTIED_HEADS}
            return next((n for n in self.tensors if n.endswith(endings[part])), None)
        from surgery.sites import Site

        place = self.anatomy.places.get(Site(None, part))
        return place.name if place else None

    def rope(self) -> dict[str, Any]:
        """theta (None where config.json leaves it to the class) and scaling (type and its numbers, empty for none)."""
        said = self.get("rope_parameters") or self.get("rope_scaling") or {}
        said = dict(said) if isinstance(said, dict) else {}
        theta = said.pop("rope_theta", None) or self.get("rope_theta") or self.get("rotary_emb_base")
        kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
        scaling = (
            {} if kind == "default" and not said else {"type": kind, **{k: v for k, v in said.items() if k != "type"}}
        )
        return {"theta": theta, "scaling": scaling}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Site -> ``[out, in]``, where the anatomy is known."""
        if self.anatomy is None:
            return {}
        found = {}
        for site, place in self.anatomy.places.items():
            shape = self.tensors[place.name].shape
            shape = shape if place.expert is None else shape[1:]
            shape = shape[::-1] if place.transposed and len(shape) == 2 else shape
            if place.rows is not None:
                rows = place.rows
                count = len(range(*rows.indices(shape[0]))) if isinstance(rows, slice) else len(rows)
                shape = (count, *shape[1:])
            found[str(site)] = tuple(shape)
        return found


def locate(ref: str | os.PathLike[str]) -> tuple[Path | None, str]:
    """The local folder a reference means, without asking a network; else None and what to do about it."""
    text = str(ref)
    if text == "specimen":
        from surgery.specimen import NAME, cache, fault

        folder = cache() / NAME
        wrong = fault(folder)
        return (folder, "") if wrong is None else (None, "Run `surgery specimen` once")
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path, ""
    except (OSError, RuntimeError):  # a name too long for any file, or the home of nobody
        return None, "Give an existing folder, a hub id that is in the local cache, or 'specimen'"
    named = hub_id(text)
    if named is not None:
        snapshot = _in_hub_cache(*named)
        if snapshot:
            return snapshot, ""
        if "/" not in text:  # more often a folder's than a model's of before owners
            return None, _nearby(path)
        return None, f"Download it first: {download_words(*named)}, or correct the name"
    return None, _nearby(path)


def examine(ref: str, place: Place | Problem) -> tuple[Facts | None, list[Problem]]:
    """What a model folder holds and all that is wrong with it by itself. None where there is nothing to compare.

    place: where it is, or why it is nowhere.
    """
    if isinstance(place, Problem):
        return None, [place]
    folder = place.folder
    problems = [_fault(f) for f in stray_links(folder)]
    if not (folder / "config.json").is_file():
        if (folder / CONFIG).is_file():
            found, fix = "is an adapter, not a model", f"Write BASE+{ref} in a recipe, or --add {ref} to its base"
            return None, [Problem("error", "adapter", str(folder), found, fix)]
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        fix = "Give a folder with config.json and safetensors files"
        return None, [
            *problems,
            Problem("error", "config", str(folder), f"has no config.json (there is: {there})", fix),
        ]
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return None, [*problems, _said("config", folder / "config.json", error)]
    headers = read_folder(folder, place.sizes)
    problems = [_fault(f) for f in headers.faults]
    anatomy, wrong = _anatomy(config, headers.tensors, folder, whole=not headers.faults)
    problems += wrong
    digest, vocabulary, wrong = _tokenizer(folder)
    problems += wrong
    template, wrong = _template(folder)
    problems += wrong
    facts = Facts(str(ref), place, config, headers.tensors, anatomy, digest, vocabulary, template)
    if headers.tensors:
        problems += [p for check in (_quantised, _layers, _tie, _vocabulary, _heads, _mixed) for p in check(facts)]
    return facts, problems


# --- one folder by itself -----------------------------------------------------------------------------------------------------


def _anatomy(
    config: Mapping[str, Any], tensors: Mapping[str, Entry], folder: Path, whole: bool
) -> tuple[Anatomy | None, list[Problem]]:
    from surgery.anatomy import Anatomy

    try:
        a = Anatomy.of(RawConfig(config, tensors), tensors, where=str(folder))  # type: ignore[arg-type]
        counts = {
            "layers": a.n_layers,
            "heads": a.n_heads,
            "key/value heads": a.n_kv_heads,
            "wide heads": a.head_dim,
            "wide": a.d_model,
        }
        wrong = next((f"{n} {words}" for words, n in counts.items() if type(n) is not int or n < 1), None)
        if wrong is None:
            return a, []
        fix = "Take the config.json that belongs to these files"
        return None, [Problem("error", "config", str(folder / "config.json"), f"says {wrong}", fix)]
    except AttributeError as error:
        found = f"leaves {str(error)!r} to the defaults of its class, so head geometry is not checked"
        return None, [Problem("note", "config", str(folder / "config.json"), found, "Nothing to do")]
    except (ValueError, TypeError, OverflowError) as error:
        kind = "family" if "without a table" in str(error) else "missing"
        if kind == "missing" and not whole:  # said already, and better
            return None, []
        said, _, fix = str(error).removeprefix(f"{folder} ").removesuffix(".").partition(". ")
        return None, [Problem("error", kind, str(folder), said, fix or "Download it again")]


class RawConfig(SimpleNamespace):
    """config.json with the attributes that `Anatomy.of` asks for. AttributeError names what the file leaves to its class."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Entry] = {}) -> None:
        super().__init__(**{str(k): v for k, v in config.items()})
        for name, older in _ALIASES.items():
            value = next((config[o] for o in (name, *older) if config.get(o) is not None), None)
            if value is not None:
                setattr(self, name, value)
        if not isinstance(config.get("tie_word_embeddings"), bool):
            self.tie_word_embeddings = bool(tensors) and not any(n.endswith(_UNTIED_HEADS) for n in tensors)
        self._tensors = tensors

    def get_text_config(self, decoder: bool = True) -> RawConfig:
        inner = getattr(self, "text_config", None)
        return RawConfig(inner, self._tensors) if isinstance(inner, dict) else self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _quantised(facts: Facts) -> Iterator[Problem]:
    said = facts.config.get("quantization_config")
    named = next((n for n in facts.tensors if _QUANTISED.search(n)), None)
    whole = next(
        (t.name for t in facts.tensors.values() if t.code in ("I8", "U8", "F8_E4M3", "F8_E5M2") and len(t.shape) == 2),
        None,
    )
    if not (isinstance(said, dict) and said) and not named and not whole:
        return
    method = said.get("quant_method", "quantised") if isinstance(said, dict) else "quantised"
    found = f"is quantised ({method}{f'; {named or whole}' if named or whole else ''}): its stored numbers are codes, not weights"
    fix = (
        "Use the original, or write it out once in bfloat16: load it with transformers, .dequantize(), .save_pretrained"
    )
    yield Problem("error", "quantised", str(facts.folder), found, fix)


def _layers(facts: Facts) -> Iterator[Problem]:
    said, stacks = facts.get("num_hidden_layers"), {}
    for name in facts.tensors:
        if hit := _LAYER.match(name):
            stacks.setdefault(hit[1], set()).add(int(hit[2]))
    if type(said) is not int or not stacks or (facts.anatomy is not None and len(stacks) > 1):
        return
    found = max(len(layers) for layers in stacks.values())
    if found != said and (found > said or facts.anatomy is not None):
        words = f"says {said} layers, but the tensors have {found}"
        fix = f"Set num_hidden_layers to {found} if the files are right, or download them again"
        yield Problem("error", "layers", str(facts.folder / "config.json"), words, fix)


def _tie(facts: Facts) -> Iterator[Problem]:
    head, embed = facts.name_of("head"), facts.name_of("embed")
    head = head or next((n for n in facts.tensors if n.endswith(_UNTIED_HEADS)), None)
    where = str(facts.folder / "config.json")
    if facts.tied and head and embed and head != embed:
        one, other = facts.tensors[head], facts.tensors[embed]
        if facts.place.sizes and one.shape == other.shape and one.code == other.code:
            found = f"says that head and embedding are tied, and the files hold {head} and {embed}: whether they are the same is not known before they are downloaded"
            yield Problem(
                "warning", "tie", where, found, "Nothing to do if they are; otherwise the model is refused then"
            )
            return
        fault = two_heads(facts.folder, one, other)
        if fault is not None:
            yield _fault(fault)
    if facts.tied is False and not head:
        fix = "Set tie_word_embeddings to true if the head is the embedding, or download the missing file"
        yield Problem("error", "tie", where, "says that the head is not tied, but the files hold no head", fix)


def _vocabulary(facts: Facts) -> Iterator[Problem]:
    rows, said = facts.rows(), facts.get("vocab_size")
    if rows is None:
        return
    if type(said) is int and said != rows:
        found = f"says vocab_size {said}, but {facts.name_of('embed')} has {rows} rows"
        fix = f"Set vocab_size to {rows}"
        yield Problem("error", "vocabulary", str(facts.folder / "config.json"), found, fix)
    highest = max(facts.vocabulary.values(), default=-1)
    if highest >= rows:
        found = f"has token ids up to {highest}, but the embedding has {rows} rows: those tokens cannot be looked up"
        fix = "Take the tokenizer files of this very model, or resize the embedding (model.resize_token_embeddings)"
        yield Problem("error", "tokenizer", str(facts.folder / "tokenizer.json"), found, fix)


def _heads(facts: Facts) -> Iterator[Problem]:
    if facts.anatomy is None:
        return
    a, shapes = facts.anatomy, facts.shapes()
    for part, heads in (("attn.q", a.n_heads), ("attn.k", a.n_kv_heads), ("attn.v", a.n_kv_heads)):
        shape = shapes.get(f"0.{part}")
        if shape and shape[0] != heads * a.head_dim:
            found = f"says {heads} heads of {a.head_dim} ({heads * a.head_dim} rows), but 0.{part} has {shape[0]} rows"
            fix = "Take the config.json that belongs to these files"
            yield Problem("error", "heads", str(facts.folder / "config.json"), found, fix)


def _mixed(facts: Facts) -> Iterator[Problem]:
    floats = {code: n for code, n in facts.dtypes.items() if code in SHORT}
    if len(floats) > 1:
        counts = Counter(t.code for t in facts.tensors.values() if t.code in SHORT)
        found = "mixes " + ", ".join(f"{count} tensors of {SHORT[code]}" for code, count in counts.most_common())
        yield Problem("note", "dtype", str(facts.folder), found, "Kept as found; --dtype makes them one")
    said = str(facts.get("dtype") or facts.get("torch_dtype") or "").removeprefix("torch.")
    main = SHORT[max(floats, key=lambda c: floats[c])] if floats else ""
    if said and main and said not in {SHORT[c] for c in floats} and said in SHORT.values():
        found = f"says {said}, but the tensors are {main}: loading with dtype='auto' rounds them"
        yield Problem(
            "warning",
            "dtype",
            str(facts.folder / "config.json"),
            found,
            f"Set dtype to {main}, or write with --dtype {said}",
        )


# --- tokenizer and template ---------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> tuple[str | None, dict[str, int], list[Problem]]:
    """A hash of the vocabulary's content, the vocabulary where it can be read, and problems."""
    present = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not present:
        fix = "Copy tokenizer.json and tokenizer_config.json from the model it was made of"
        found = (
            f"has no tokenizer files (none of {', '.join(TOKENIZERS[:3])}): what is written of it cannot read a text"
        )
        return None, {}, [Problem("warning", "tokenizer", str(folder), found, fix)]
    path = folder / present[0]
    if path.suffix != ".json":
        return hash_file(path), {}, []
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than any tokenizer. Download it again."
            )
        digest, vocabulary = _content(_File(hash_file(path), path))
    except CheckpointError as error:
        return None, {}, [_said("tokenizer", path, error)]
    return digest, vocabulary, []


@dataclass(frozen=True)
class _File:
    """A file as its bytes: wherever they lie, they are the same."""

    digest: str
    path: Path = field(compare=False)


@lru_cache(maxsize=4)
def _content(file: _File) -> tuple[str, dict[str, int]]:
    """The hash of a vocabulary, and the vocabulary; siblings have the same, and it is read once."""
    vocabulary = _read_vocabulary(file.path)
    text = "\n".join(f"{i} {token}" for token, i in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hash_bytes(text.encode("utf-8", "surrogatepass")), vocabulary


def _read_vocabulary(path: Path) -> dict[str, int]:
    found = read_json(path)
    if path.name == "vocab.json":
        table, added = found, []
    else:
        model = found.get("model") if isinstance(found, dict) else None
        table = model.get("vocab") if isinstance(model, dict) else None
        added = found.get("added_tokens") or [] if isinstance(found, dict) else []
    if isinstance(table, list):  # unigram: [token, score] in order of their ids
        table = {row[0]: i for i, row in enumerate(table) if isinstance(row, list) and row and isinstance(row[0], str)}
    extra = {
        t["content"]: t["id"] for t in added if isinstance(t, dict) and isinstance(t.get("content"), str) and type(t.get("id")) is int
    } if isinstance(added, list) else {}  # fmt: skip
    if not isinstance(table, dict) or not all(type(i) is int and i >= 0 for i in table.values()):
        raise CheckpointError(f"{path} holds no vocabulary of tokens and ids. Download it again.")
    return {**table, **extra}


def _template(folder: Path) -> tuple[str | None, list[Problem]]:
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size < 10_000_000:
        return file.read_text(encoding="utf-8", errors="replace").strip(), []
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        try:
            said = read_json(folder / name)
        except CheckpointError as error:
            return None, [_said("tokenizer", folder / name, error)]
        template = said.get("chat_template") if isinstance(said, dict) else None
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template.strip(), []
    return None, []


# --- adapters and deltas ------------------------------------------------------------------------------------------------------


def check_adapter(place: Place, base: Facts) -> list[Problem]:
    """What is wrong with a LoRA folder as an addition to `base`."""
    folder = place.folder
    where = str(folder)
    problems = [_fault(f) for f in stray_links(folder)]
    try:
        config = read_adapter_config(folder)
        entries, _ = read_header(folder / WEIGHTS, place.sizes.get(WEIGHTS))
    except CheckpointError as error:
        return [*problems, _said("adapter", folder, error)]
    misfits, absent = [], []
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    names = _names(base)
    for entry in entries:
        module, kind = split_key(entry.name)
        name = names.find(module if kind is None else f"{module}.weight")
        if name is None:
            absent.append(module.removeprefix("base_model.model."))
            continue
        if kind is not None:
            pairs.setdefault(module, {})[kind] = entry.shape
        if kind in ("lora_A", "lora_B") and len(entry.shape) == len(base.tensors[name].shape) == 2:
            width = entry.shape[1] if kind == "lora_A" else entry.shape[0]
            if width not in base.tensors[name].shape:
                misfits.append(f"{entry.name} {entry.shape} against {base.tensors[name].shape}")
    for rows, words in (
        (misfits, "does not fit the base's shapes"),
        (sorted(set(absent)), "changes modules the base lacks"),
    ):
        if rows:
            fix = f"Use the adapter's own base, {config.get('base_model_name_or_path') or 'which its config does not name'}"
            found = f"{words} ({base.ref}): {len(rows)}, first {', '.join(rows[:3])}"
            problems.append(Problem("error", "adapter", where, found, fix))
    if not misfits and not absent:
        problems += _pairs(folder, config, pairs, names, base)
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and not misfits and not absent and not _same_model(named, base):
        found = f"was trained on {named}, and is to be added to {base.ref}"
        problems.append(
            Problem("warning", "adapter", where, found, f"Make sure that {base.ref} is {named}, or use {named}")
        )
    return problems


def _pairs(
    folder: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, Mapping[str, tuple[int, ...]]],
    names: Names,
    base: Facts,
) -> Iterator[Problem]:
    """The first module whose tensors are no LoRA of the base's matrix, as the config reads them."""
    places = base.anatomy.places.values() if base.anatomy else ()
    transposed = {place.name for place in places if place.transposed}
    for module, kinds in pairs.items():
        name = names.find(f"{module}.weight")
        assert name is not None  # the others are absent
        shape = base.tensors[name].shape
        try:
            lora_pair(config, module, kinds, shape[::-1] if name in transposed else shape, base.ref, folder)
            if "lora_B.bias" in kinds and names.find(f"{module}.bias") is None:
                raise unusable(
                    folder, f"it adds a bias to {module}, which has none in {base.ref}, so it cannot be merged."
                )
        except CheckpointError as error:
            yield _said("adapter", folder, error)
            return


def check_delta(place: Place, base: Facts) -> list[Problem]:
    """What is wrong with a delta folder as an addition to `base`."""
    import json

    folder = place.folder
    path = folder / DELTA
    try:
        _, metadata = read_header(path, place.sizes.get(DELTA))
        if not metadata.get("format", "").startswith("model-surgery delta"):
            raise CheckpointError(
                f"{path} is no delta: its format is {metadata.get('format')!r}. `surgery diff TUNED BASE --to VECTOR` writes one."
            )
        shapes = json.loads(metadata.get("shapes", "null"))
        if not isinstance(shapes, dict):
            raise CheckpointError(f"{path} has no table of shapes. `surgery diff TUNED BASE --to VECTOR` writes one.")
    except (CheckpointError, ValueError, RecursionError) as error:
        return [_said("delta", path, error)]
    problems = [_fault(f) for f in stray_links(folder)]
    problems += _landing(
        folder, {str(name): shape for name, shape in shapes.items()}, metadata.get("origins", "[]"), base
    )
    of_now = metadata["format"] == DELTA_FORMAT  # the earlier ones knew their base by another hash
    measured, known = metadata.get("base_hash", "") if of_now else "", _recorded_hash(base.folder)
    ref = _recorded_base(folder)
    if known and measured and known != measured:
        found = f"was measured from {ref or 'a base'} (hash {measured[:12]}), not from {base.ref} (hash {known[:12]})"
        problems.append(
            Problem(
                "warning",
                "delta",
                str(folder),
                found,
                f"Add it to {ref or 'its own base'}, or make sure that this is meant",
            )
        )
    elif not known and ref and not _same_model(ref, base):
        found = f"was measured from {ref} (hash {measured[:12]}); whether {base.ref} is the same is not known before it is read"
        problems.append(
            Problem(
                "warning", "delta", str(folder), found, f"Add it to {ref}, or make sure that {base.ref} is a copy of it"
            )
        )
    return problems


def moved_by_adapter(place: Place, base: Facts) -> int:
    """How many numbers of `base` an adapter moves: of the matrices that factors are added to, of biases, and of what it holds whole."""
    try:
        entries, _ = read_header(place.folder / WEIGHTS, place.sizes.get(WEIGHTS))
    except CheckpointError:
        return 0
    names, moved = _names(base), set()
    for entry in entries:
        module, kind = split_key(entry.name)
        of_module = "bias" if kind == "lora_B.bias" else "weight"
        moved.add(names.find(module if kind is None else f"{module}.{of_module}"))
    return sum(math.prod(base.tensors[name].shape) for name in moved if name is not None)


def _names(base: Facts) -> Names:
    """Which of a model's tensors an adapter's keys mean."""
    return Names(base.tensors, base.name_of("embed") if base.tied else None)


def moved_by_delta(path: Path, size: int | None = None) -> int:
    """How many numbers of a model a delta's file moves: what it stores sparse or dense, and what its factors multiply to.

    size: of the file in bytes, where no more than its header is here.
    """
    try:
        entries, _ = read_header(path, size)
    except CheckpointError:
        return 0
    shapes = {e.name: e.shape for e in entries}
    moved = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(".value"))
    for name, shape in shapes.items():
        other = shapes.get(name.removesuffix(".left") + ".right")
        if name.endswith(".left") and other and len(shape) == len(other) == 2:
            moved += shape[0] * other[1]
    return moved


def _landing(folder: Path, shapes: Mapping[str, Any], origins: str, base: Facts) -> Iterator[Problem]:
    """How a delta's sites fit the model: only rows that stand for tokens may be more or fewer, and only whole sites may be absent."""
    import json

    ours, anatomy = base.shapes(), base.anatomy
    if anatomy is None:
        return
    fix = "Add it to a model of its own base's architecture"
    try:
        known = json.loads(origins)
        depths, ties = {origin["layers"] for origin in known}, {origin["tied"] for origin in known}
    except (ValueError, LookupError, TypeError, RecursionError):
        depths, ties = set(), set()
    if depths - {anatomy.n_layers}:
        found = f"was measured on {min(depths)} layers, and {base.ref} has {anatomy.n_layers}: layers do not correspond"
        yield Problem("error", "delta", str(folder), found, fix)
        return
    misfits, rows, absent = [], [], []
    for name, shape in shapes.items():
        here = ours.get(name)
        there = tuple(shape) if isinstance(shape, list) else None
        layer = name.split(".", 1)[0]
        if there is None or (here is None and layer.isdecimal() and int(layer) >= anatomy.n_layers):
            misfits.append(f"{name}: {there} against {here or 'absent'}")
        elif here is None:
            absent.append(name)
        elif here != there:
            by_token = name in ("embed", "head", "head.bias") and here[1:] == there[1:]
            (rows if by_token else misfits).append(f"{name}: {there} against {here}")
    if misfits or len(absent) == len(shapes):
        wrong = misfits or absent
        found = f"does not fit {base.ref}: {len(wrong)} of {len(shapes)} sites differ, first {'; '.join(wrong[:3])}"
        yield Problem("error", "delta", str(folder), found, fix)
        return
    tie = _across_ties(folder, [site for site in ("embed", "head") if site in shapes], ties, base)
    if tie is not None:
        absent = [site for site in absent if site != "head"]
        yield tie
    if rows:
        found = f"has another vocabulary than {base.ref} ({'; '.join(rows)}): only the rows that both have move"
        yield Problem(
            "warning", "vocabulary", str(folder), found, "Make sure that the common rows stand for the same tokens"
        )
    if absent:
        found = f"moves {len(absent)} sites that {base.ref} lacks, first {', '.join(absent[:3])}: they are left out"
        yield Problem(
            "warning",
            "delta",
            str(folder),
            found,
            "Nothing to do if that is meant; otherwise use a model that has them",
        )


def _across_ties(folder: Path, moved: list[str], ties: set[bool], base: Facts) -> Problem | None:
    """What comes of a vector that moves the embedding or the head where its own models tie them and this one does not, or the reverse."""
    if not moved:
        return None
    fix = 'Leave both out, with keep(at=["*.attn.**", "*.mlp.**"]), or use a model that does not tie them'
    if len(ties) == 2:
        found = "is a sum of vectors from models that tie the head to the embedding and from models that do not"
        return Problem("error", "tie", str(folder), found, "Add each part by itself")
    if base.tied and ("head" in moved or ties == {False}):
        if len(moved) == 1:
            found = f"moves {moved[0]} alone, and {base.ref} ties head to embed: one matrix for both"
            return Problem("error", "tie", str(folder), found, fix)
        found = f"moves embed and head, and {base.ref} has one matrix for both: it lands only if both move alike, which headers do not say"
        return Problem("warning", "tie", str(folder), found, fix)
    if base.tied is False and ties == {True} and "embed" in moved:
        found = f"moves the embedding of models that tie the head to it: in {base.ref} the head moves as well"
        return Problem("note", "tie", str(folder), found, "Nothing to do if that is meant")
    return None


def _recorded_hash(folder: Path) -> str | None:
    """The hash a record beside the weights gives them."""
    record = _record(folder)
    results = record.get("results")
    found = results.get("hash") if isinstance(results, dict) else None
    return found if isinstance(found, str) else None


def _recorded_base(folder: Path) -> str | None:
    inputs = _record(folder).get("inputs")
    base = inputs.get("base") if isinstance(inputs, dict) else None
    ref = base.get("ref") if isinstance(base, dict) else None
    return ref if isinstance(ref, str) else None


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / RECORD)
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def _same_model(ref: str, base: Facts) -> bool:
    folder, _ = locate(ref)
    if folder is not None and folder.resolve() == base.folder.resolve():
        return True
    return ref == base.ref or Path(ref).name.lower() == base.folder.resolve().name.lower()


# --- where a reference is -----------------------------------------------------------------------------------------------------


def hub_cache() -> Path:
    """Where the hub's client keeps what it downloads; found without importing it."""
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not home:
        home = os.path.join(
            os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"),
            "hub",
        )
    return Path(home).expanduser()


def _in_hub_cache(name: str, revision: str) -> Path | None:
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    ref = repository / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision  # which may be a commit itself
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def in_one_line(text: str) -> str:
    """A text without line breaks or what cannot be printed, cut where nobody would read on."""
    text = " ".join(text.split())
    text = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 600 else f"{text[:600]}..."


def _nearby(path: Path) -> str:
    import difflib

    if path.is_file():
        return "Give the model's folder, not a file of it"
    parent = path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"{MEANT} {parent / close[0]}?"
    return "Give an existing folder, a hub id that is in the local cache, or 'specimen'"


def _fault(fault: Fault) -> Problem:
    return Problem("error", fault.kind, str(fault.where), fault.found, fault.fix)


def _said(kind: str, where: Path, error: Exception) -> Problem:
    """A reader's message as a problem: its last sentence is the fix."""
    text = " ".join(str(error).split()).removesuffix(".")
    said, _, fix = text.rpartition(". ")
    return Problem("error", kind, str(where), (said or text).removeprefix(f"{where} "), fix or "Download it again")


__all__ = ["SIZES", "Facts", "Place", "Problem", "Severity", "check_adapter", "check_delta", "examine", "locate"]

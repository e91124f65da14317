"""The proof of a written model: loaded as anybody would load it, and compared with what was computed.

A model that fits beside what is in memory is loaded whole. A larger one is loaded with its weights left in their files, and its
forward pass fetches them one module at a time: the proof then takes minutes, not memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint, load_module
from surgery.hashing import hash_bytes
from surgery.headers import read_folder
from surgery.side_files import side_files
from surgery.sites import Site
from surgery.tensorfile import CheckpointError, raw_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loops = Literal["ignore", "report", "refuse"]
SHARE = 0.4  # of the memory that is free: the largest model that is loaded whole
_PROBES = 1, 8  # sequences, and tokens of each, whose logits are compared
_SAID = 32  # tokens of the generation that must not loop


class VerificationError(CheckpointError):
    """What was written is not what was asked for."""


def prove(
    folder: Path, hashes: Mapping[str, str], source: Checkpoint, dtype: torch.dtype | None, loops: Loops = "ignore"
) -> list[str]:
    """Load a folder as anybody would, through transformers, and compare it with what was computed.

    In this order: tokenizer, template, processor and generation files are all there and the source's, byte for byte; every tensor has the
    hash taken while it was computed (`hashes`); tied tensors are one; logits on probe prompts are finite and equal to the predicted ones, those
    of the *source's* configuration carrying the tensors as computed; a short greedy generation does not fall into a loop, unless the
    source does too (`loops`: "refuse", only "report", or "ignore", which generates nothing).

    Returns what was checked, in words. Raises VerificationError naming the first culprit.
    """
    compared = _side_files(folder, source, side_files(source.folder), dtype)
    checks = [f"{compared} side files are the source's"]
    written = _read_back(folder, hashes)
    with _opened_written(written) as module:
        loaded = _loaded(module, written)
        how = _bytes_agree(loaded, hashes, written)
        checks += [f"{len(hashes)} tensors bit-equal to those computed ({how})", *_ties_hold(module, written.anatomy)]
        checks.append(_logits_agree(module, loaded, written, source))
        if loops != "ignore":
            checks.append(_does_not_loop(module, folder, source, loops))
    return checks


def prove_found(folder: Path, hashes: Mapping[str, str], like: Checkpoint, kept: Collection[str]) -> list[str]:
    """The same for a folder that another program wrote: what it computed is not known, so that less is proved, and less is said.

    hashes: of the tensors as they are in the files. like: the checkpoint it is to be configured like. kept: the side files that are to be
    that one's. The logits are predicted by its configuration where it has as many layers and tokens, otherwise by the folder's own.
    """
    checks = [f"{_side_files(folder, like, kept, None)} side files are the base's"]
    written = _read_back(folder, hashes)
    size, its = ((c.anatomy.n_layers, c.anatomy.vocab) for c in (written, like))
    with _opened_written(written) as module:
        loaded = _loaded(module, written)
        how = _bytes_agree(loaded, hashes, written)
        checks += [f"{len(hashes)} tensors as they are in the files ({how})", *_ties_hold(module, written.anatomy)]
        said = _logits_agree(module, loaded, written, like if size == its else written)
        checks.append(said if size == its else f"{said} by its own configuration")
    return checks


def judge_generation(folder: Path, source: Checkpoint, loops: Loops) -> str:
    """The last check of `prove` by itself, for a model whose layers are not the source's."""
    with _opened_written(Checkpoint(folder)) as module:
        return _does_not_loop(module, folder, source, loops)


def _read_back(folder: Path, hashes: Mapping[str, str]) -> Checkpoint:
    """The written folder as a checkpoint of exactly the tensors that were computed."""
    found = read_folder(folder)
    for fault in found.faults:
        where = "the folder" if fault.where == folder else fault.where.name
        raise VerificationError(f"The written model cannot be read: {where} {fault.found}.")
    lost, strange = (
        [n for n in one if n not in other] for one, other in ((hashes, found.tensors), (found.tensors, hashes))
    )
    if lost:
        raise VerificationError(f"The written model lacks {lost[0]}, which was computed ({len(lost)} such).")
    if strange:
        raise VerificationError(f"The written model has {strange[0]}, which nobody computed ({len(strange)} such).")
    with _blamed(folder):
        return Checkpoint(folder)


@contextmanager
def _opened_written(written: Checkpoint) -> Iterator[PreTrainedModel]:
    with ExitStack() as open_until_then:
        with _blamed(written.folder):
            module = open_until_then.enter_context(_opened(written, written.folder.parent))
        yield module


@contextmanager
def _blamed(folder: Path) -> Iterator[None]:
    """That the written model does not load, said as that: its folder is a temporary one, and was not downloaded."""
    try:
        yield
    except VerificationError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        said = str(error).replace(f"{folder}/", "").replace(f"{folder} ", "it ").partition(". ")[0].removesuffix(".")
        raise VerificationError(f"The written model failed to load: {said or type(error).__name__}.") from error


@contextmanager
def _opened(checkpoint: Checkpoint, scratch: Path) -> Iterator[PreTrainedModel]:
    """The transformers model of a checkpoint: whole where it fits, otherwise with its weights left in their files.

    scratch: a folder that may be written to.
    """
    if checkpoint.nbytes <= SHARE * free_memory():
        yield load_module(checkpoint.folder, "auto")
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".spill-") as spill:
        yield load_module(checkpoint.folder, "auto", offload=Path(spill))


def probe_ids(vocab: int) -> Int[Tensor, "sequence token"]:
    """The probe prompts: token ids spread over the vocabulary, the same for every model of its size."""
    return torch.randint(0, vocab, _PROBES, generator=torch.Generator().manual_seed(0))


def free_memory() -> int:
    """Bytes this process may still take: what the machine has free, or less where its control group or a resource limit says so."""
    import psutil

    return min([psutil.virtual_memory().available, *_limits()])


def _limits() -> Iterator[int]:
    import resource

    import psutil

    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().data
    yield from _groups_leave(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))


def _groups_leave(groups: Path, own: Path) -> Iterator[int]:
    """Bytes that each control group with a limit leaves, of those that a process is in; a group within another is within its limit."""
    for line in own.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if own.exists() else ():
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        home, limit = (groups / kind, "memory.limit_in_bytes") if kind else (groups, "memory.max")
        inner = home / path.strip("/")
        # inside a container the path is another's view: its own group is at home
        for place in (inner, *(outer for outer in inner.parents if outer.is_relative_to(home))):
            try:
                yield int((place / limit).read_text(encoding="ascii")) - _in_use(place / "memory.stat")
            except (OSError, ValueError):  # not there, or "max"
                continue


def _in_use(stat: Path) -> int:
    """Bytes of a control group that nothing can take back from its processes; what files are cached in is not among them."""
    counted = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    return int(counted.get("anon", counted.get("total_rss", 0)))


def loops_at_end(ids: Iterable[int], times: int = 4, longest: int = 8) -> list[int] | None:
    """The tokens that a sequence ends in repeating at least `times` times in a row (at most `longest` of them), or None."""
    ids = list(ids)
    for period in range(1, longest + 1):
        tail = ids[-times * period :]
        if len(tail) == times * period and tail == tail[:period] * times:
            return tail[:period]
    return None


def _side_files(folder: Path, source: Checkpoint, names: Collection[str], dtype: torch.dtype | None) -> int:
    """How many of the source's files that surround the weights surround the written ones: all of them, or VerificationError names one."""
    for name in names:
        ours, theirs = folder / name, source.folder / name
        if not ours.is_file():
            raise VerificationError(f"{name} is missing: the source has it, and it should have been copied.")
        same = ours.read_bytes() == theirs.read_bytes()
        if name == "config.json" and dtype is not None:
            same = _without_dtype(ours) == _without_dtype(theirs)
        if not same:
            raise VerificationError(f"{name} differs from the source's: it should have been copied as it is.")
    return len(names)


def _without_dtype(path: Path) -> Any:
    said = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in said.items() if key not in ("dtype", "torch_dtype")}


def _loaded(module: PreTrainedModel, written: Checkpoint) -> dict[str, Tensor]:
    """Tensors of the live module, by the name the file has for them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if any(p.is_meta for p in parameters.values()):  # left in the files
        return {}
    live = Anatomy.of(module.config, parameters, where=str(written.folder))
    found: dict[str, Tensor] = {}
    for name, sites in written.anatomy.stored_in().items():
        parameter = parameters.get(name, parameters.get(f"{module.base_model_prefix}.{name}"))
        if parameter is not None:
            found[name] = parameter
        elif len(sites) == 1 and sites[0] in live.places and written.anatomy.places[sites[0]].is_whole:
            place = live.places[sites[0]]  # renamed or packed in memory
            found[name] = place.take(parameters[place.name])
    # a model is loaded in one dtype: of a tensor that the file has in another, the bytes are only there
    return {name: tensor for name, tensor in found.items() if tensor.dtype == written.tensors[name].dtype}


def _bytes_agree(loaded: Mapping[str, Tensor], hashes: Mapping[str, str], written: Checkpoint) -> str:
    """How every tensor was found to have its hash."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(lambda tensor: hash_bytes(raw_bytes(tensor)), loaded.values())
        for name, digest in zip(loaded, digests, strict=True):
            if digest != hashes[name]:
                raise VerificationError(
                    f"{name} as loaded differs from {name} as computed: the file or its loading is at fault."
                )
    rest = [name for name in hashes if name not in loaded]
    if rest:
        found = written.hashes()
        for name in rest:
            if found.get(name) != hashes[name]:
                raise VerificationError(f"{name} on disk differs from {name} as computed.")
    how = [f"{len(loaded)} as loaded by transformers"] if loaded else []
    return ", ".join([*how, *([f"{len(rest)} as read back"] if rest else [])])


def _ties_hold(module: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    tied = []
    for site, target in anatomy.ties.items():
        head, embed = (
            m.weight for m in (module.get_output_embeddings(), module.get_input_embeddings()) if m is not None
        )
        if head is not embed and not head.is_meta:
            raise VerificationError(f"{site} should be tied to {target}, but loading made them two tensors.")
        if not getattr(module.config, "tie_word_embeddings", False):
            raise VerificationError(f"{site} should be tied to {target}, but config.json says it is not.")
        tied.append(f"{site} tied to {target}")
    return tied


def _logits_agree(
    module: PreTrainedModel, loaded: Mapping[str, Tensor], written: Checkpoint, source: Checkpoint
) -> str:
    """The logits on the probe prompts are finite, and those that the source's configuration predicts."""
    probes = probe_ids(written.anatomy.vocab)
    actual = _logits(module, probes)
    if not bool(torch.isfinite(actual).all()):
        raise VerificationError("The written model gives logits that are NaN or infinite.")
    return _as_predicted(actual, _predicted(module, loaded, written, source, probes))


def _predicted(
    module: PreTrainedModel, loaded: Mapping[str, Tensor], written: Checkpoint, source: Checkpoint, probes: Tensor
) -> Tensor | None:
    """Logits of the source's architecture and configuration with the written tensors put in by name, not by the loader."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        skeleton: Any = type(module)._from_config(
            source.config, dtype=module.dtype, attn_implementation=module.config._attn_implementation
        )
    skeleton.tie_weights()  # so that a shared tensor is put in once
    by_name = dict(module.named_parameters(remove_duplicate=False))
    names = dict(skeleton.named_parameters())
    homes = Anatomy.of(source.config, names, where=str(source.folder)).stored_in()
    for name, parameter in names.items():
        tensor = _stored(loaded, written, name, homes.get(name, []))
        if tensor is None:  # packed by the loader: its bytes were compared above
            tensor = by_name[name]
        if tensor.is_meta or tensor.shape != parameter.shape:
            return None
        tensor = tensor.to(by_name[name].dtype if name in by_name else parameter.dtype)
        owner, _, last = name.rpartition(".")
        setattr(skeleton.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    skeleton.tie_weights()
    return _logits(skeleton.eval(), probes)


def _stored(loaded: Mapping[str, Tensor], written: Checkpoint, name: str, sites: list[Site]) -> Tensor | None:
    """The written tensor that belongs at a live name: of that name, or at the same site where loading renames.

    From memory where its bytes there have been compared already: reading 300 MB of fresh pages takes as long as the pass itself.
    """
    if name not in written.tensors:
        place = written.anatomy.places.get(sites[0]) if len(sites) == 1 else None
        if place is None or not place.is_whole:
            return None
        name = place.name
    return loaded[name] if name in loaded else written.stored(name)


def _as_predicted(actual: Float[Tensor, "s t v"], predicted: Float[Tensor, "s t v"] | None) -> str:
    if predicted is None:
        return "probe logits finite (not predicted: this family's tensors are packed on loading, and the model is too large to hold)"
    apart = float((actual.float() - predicted.float()).abs().max())
    allowed = 4 * torch.finfo(actual.dtype).eps * float(predicted.float().abs().max())
    if not apart <= allowed:
        raise VerificationError(
            f"The written model's logits are up to {apart:.3g} from the predicted ones (rounding explains {allowed:.3g}): its "
            "configuration, or what loading makes of the tensors, is not the source's."
        )
    return f"logits on {actual.shape[0] * actual.shape[1]} probe tokens as predicted (max difference {apart:.3g})"


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _does_not_loop(module: PreTrainedModel, folder: Path, source: Checkpoint, loops: Loops) -> str:
    if any(p.is_meta for p in module.parameters()):
        return "nothing generated: the model is larger than the memory at hand"
    prompt = _prompt(folder, source.anatomy.vocab)
    repeated = loops_at_end(_greedy(module, prompt))
    if repeated is None:
        return f"{_SAID} tokens generated, no loop"
    with _opened(source, folder.parent) as original:
        as_before = loops_at_end(_greedy(original, prompt)) is not None
    if as_before:
        return f"{_SAID} tokens generated: a loop, as the source's own"
    words = _decoded(folder, repeated)
    if loops == "refuse":
        raise VerificationError(
            f"The written model's generation falls into a loop ({words!r} over and over), which the source's does not. "
            "A smaller strength may keep it whole; --allow-loops writes it all the same."
        )
    return f"{_SAID} tokens generated: a loop ({words!r}), which the source does not fall into"


def _greedy(module: PreTrainedModel, prompt: list[int]) -> list[int]:
    from transformers import GenerationConfig

    ids = torch.tensor([prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=_SAID, pad_token_id=0)
    out: Any = module.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return out[0, len(prompt) :].tolist()


def _prompt(folder: Path, vocab: int) -> list[int]:
    """A question in the model's own chat template, as text where it has none; a few tokens where there is no tokenizer."""
    from transformers import AutoTokenizer

    asked = "What is 17 + 25? Think step by step."
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):  # a folder of weights alone
        return probe_ids(vocab)[0].tolist()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": asked}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(asked)["input_ids"])


def _decoded(folder: Path, ids: list[int]) -> str:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).decode(ids)
    except (OSError, ValueError):
        return str(ids)

"""Three checkpoints merged from disk to disk, verification included, beside mergekit's `run_merge`, and beside a plain copy."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import bench_write, measure
from tests.benchmarks.bench_write import disagreement, perturbed

WEIGHTS = (0.4, 0.3, 0.2)
SYNTHETIC_BYTES = 2_000_000_000
METHODS = ("linear", "task_arithmetic", "ties")


def recipe(method: str, base: str, models: list[str]) -> dict[str, Any]:
    """Arithmetic in float32 and bf16 stored, on both sides. The base of the vectors is the first of the three checkpoints."""
    entries: list[dict[str, Any]] = []
    for model, weight in zip(models, WEIGHTS, strict=True):
        parameters = {"weight": weight} | ({"density": 0.5} if method == "ties" else {})
        entries.append({"model": model, "parameters": parameters})
    said: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32", "out_dtype": "bfloat16"}
    if method != "linear":
        said |= {"base_model": base, "models": entries[1:]}
    return said


def ours(method: str, base: str, models: list[str], folder: str) -> Callable[[], object]:
    """Our side; what it writes is reloaded and checked."""
    from surgery.merging import merge

    to = measure.fresh(folder, "ours")
    return partial(merge, recipe(method, base, models), to)


def mergekit(method: str, base: str, models: list[str], folder: str) -> Callable[[], object]:
    """mergekit's own run of the same recipe; nothing checks what it writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(recipe(method, base, models))
    options = MergeOptions(copy_tokenizer=True, lazy_unpickle=False, write_model_card=False, quiet=True)
    return partial(run_merge, config, str(measure.fresh(folder, "mergekit")), options)


def copy(method: str, base: str, models: list[str], folder: str) -> Callable[[], object]:
    """The bytes of one checkpoint, read and written again."""
    return bench_write.copy(base, models[0], folder)


def synthetic(
    to: Path,
    size: int = SYNTHETIC_BYTES,
    shards: int = 4,
    seed: int = 0,
    beside: int | None = None,
    width: int = 2048,
    vocabulary: int = 32_000,
) -> Path:
    """A random bf16 llama of about `size` bytes in `shards` files, written a tensor at a time.

    beside: seed of a sibling, of which this one is a copy with 2 % of noise.
    """
    from surgery.tensorfile import raw_bytes

    inner, heads, keys = width * 11 // 4, width // 64, max(1, width // 256)
    matrices = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (width * keys // heads, width),
        "self_attn.v_proj": (width * keys // heads, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
    layer = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    a_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(shards, round((size - 2 * vocabulary * width) / a_layer))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    tensors |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    tensors["model.norm.weight"] = (width,)
    to.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(config, indent=2))
    names, homes = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        share = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        homes |= dict.fromkeys(share, file)
        _write_shard(to / file, {name: tensors[name] for name in share}, names.index, seed, beside, raw_bytes)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}, indent=2))
    return to


def _write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    number: Callable[[str], int],
    seed: int,
    beside: int | None,
    raw: Callable[[torch.Tensor], memoryview],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        length = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _values(shape, number(name), seed, beside):
                sink.write(raw(piece))


def _values(shape: tuple[int, ...], number: int, seed: int, beside: int | None) -> Iterator[torch.Tensor]:
    """A tensor's values, 2^22 at a time."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    size = 1 << 22
    left, first = torch.Size(shape).numel(), torch.Generator().manual_seed((beside or seed) * 100_003 + number)
    second = torch.Generator().manual_seed(seed * 100_003 + number)
    while left:
        count = min(size, left)
        values = torch.randn(count, generator=first).mul_(0.02)
        if beside is not None:
            values.add_(torch.randn(count, generator=second), alpha=0.0004)
        yield values.bfloat16()
        left -= count


def run(folder: Path | str, base: Path | str, repeats: int = 3) -> list[measure.Row]:
    """Rows for three checkpoints of the size of `base`, a single bf16 file.

    folder: where everything is written and then removed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as here:
        models = [str(perturbed(Path(base), Path(here) / f"model{seed}", seed=seed)) for seed in range(3)]
        return _rows(here, models, "three 135M", METHODS, 0.6, repeats)


def run_large(folder: Path | str) -> list[measure.Row]:
    """Rows for three synthetic sharded checkpoints, once; about 20 GB at a time."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        kin = [synthetic(Path(here) / f"model{seed}", seed=seed, beside=None if seed == 1 else 1) for seed in (1, 2, 3)]
        return _rows(here, [str(path) for path in kin], "three of 2 GB, sharded", METHODS[1:], 0.4, repeats=1)


def _rows(
    here: str, models: list[str], what: str, methods: Iterable[str], seconds: float, repeats: int
) -> list[measure.Row]:
    made: list[measure.Row] = []
    for method in methods:
        arguments = {"method": method, "base": models[0], "models": models, "folder": here}
        a, b = measure.beside(f"{__name__}:ours", f"{__name__}:mergekit", arguments, repeats)
        outputs = [next(Path(here).glob(f"{side}-*/out")) for side in ("ours", "mergekit")]
        note = f"arithmetic in float32, bf16 stored; {disagreement(*outputs)}"
        made += measure.rows(f"{method}, {what}", a, b, seconds=seconds, peak=0.5, note=note)
    arguments = {"method": METHODS[0], "base": models[0], "models": models, "folder": here}
    a, b = measure.beside(f"{__name__}:ours", f"{__name__}:copy", arguments, repeats)
    note = "the peer reads and writes the bytes of one checkpoint"
    made += [
        row | {"limit": None}
        for row in measure.rows(f"linear against a plain copy, {what}", a, b, seconds=1, peak=None, note=note)
    ]  # type: ignore[misc]
    return made

"""`base + 0.6 (tuned - base)` from disk to disk, verification included, beside mergekit's task_arithmetic."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import measure

STRENGTH = 0.6


def ours(base: str, tuned: str, folder: str) -> Callable[[], object]:
    """Our side; `write` reloads and checks what it wrote."""
    from surgery import Checkpoint, write

    to = measure.fresh(folder, "ours")

    def call() -> object:
        start, end = Checkpoint(base), Checkpoint(tuned)
        return write(start + STRENGTH * (end - start), to)

    return call


def _mergekit(base: str, tuned: str, folder: str, name: str, **dtypes: str) -> Callable[[], object]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    recipe = MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": tuned, "parameters": {"weight": STRENGTH}}],
            "parameters": {"normalize": False},
            **dtypes,
        }
    )
    # low_cpu_memory keeps intermediate tensors on the accelerator: on a CPU it says the same as the default
    options = MergeOptions(copy_tokenizer=True, lazy_unpickle=False, write_model_card=False, quiet=True)
    return partial(run_merge, recipe, str(measure.fresh(folder, name)), options)


def mergekit_float32(base: str, tuned: str, folder: str) -> Callable[[], object]:
    """mergekit computing in float32 and storing bfloat16: the same arithmetic as ours."""
    return _mergekit(base, tuned, folder, "mergekit-float32", dtype="float32", out_dtype="bfloat16")


def mergekit_bfloat16(base: str, tuned: str, folder: str) -> Callable[[], object]:
    """mergekit computing in bfloat16: its fastest way, less exact than ours."""
    return _mergekit(base, tuned, folder, "mergekit-bfloat16", dtype="bfloat16")


def head_edit(base: str, tuned: str, folder: str) -> Callable[[], object]:
    """An edit of 4 % of the heads (11 of the specimen's 270): their columns of attn.o, written like any other change."""
    from surgery import Checkpoint, RemoveDirection, apply, write

    to = measure.fresh(folder, "head")

    def call() -> object:
        weights = Checkpoint(base)
        heads = [f"{layer}.attn.o.h{layer % weights.anatomy.n_heads}" for layer in range(0, 22, 2)]
        direction = torch.randn(weights.anatomy.d_model, generator=torch.Generator().manual_seed(0))
        return write(apply(RemoveDirection(direction), weights, heads), to)

    return call


def copy(base: str, tuned: str, folder: str) -> Callable[[], object]:
    """The bytes of the checkpoint, read and written again, and on the disk when it returns."""
    to = measure.fresh(folder, "copy")

    def call() -> object:
        to.mkdir()
        for path in sorted(Path(base).iterdir()):
            with path.open("rb") as read, (to / path.name).open("wb") as sink:
                shutil.copyfileobj(read, sink, 1 << 22)
                os.fsync(sink.fileno())
        return to

    return call


def perturbed(base: Path, to: Path, share: float = 0.01, seed: int = 0) -> Path:
    """A copy of a single-file checkpoint with Gaussian noise of `share` times its RMS added to every matrix."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, to)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, w in tensors.items():
        if w.ndim == 2:
            noise = torch.randn(w.shape, generator=generator)
            tensors[name] = (w.float() + share * w.float().square().mean().sqrt() * noise).to(w.dtype)
    (to / "model.safetensors").unlink()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def disagreement(a: Path, b: Path) -> str:
    """How far two written models are apart, as words for the table's note."""
    from safetensors.torch import load_file

    first, second = ({} for _ in range(2))
    for found, folder in ((first, a), (second, b)):
        for file in sorted(folder.glob("*.safetensors")):
            found.update(load_file(file))
    if first.keys() != second.keys():
        raise AssertionError(f"different tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    entries = sum(w.numel() for w in first.values())
    unlike = sum(int((first[name] != second[name]).sum()) for name in first)
    return f"{unlike / entries:.2%} of the entries differ"


def run(folder: Path | str, base: Path | str, repeats: int = 7) -> list[measure.Row]:
    """Rows for both of mergekit's ways.

    folder: where everything is written and then removed. base: a single-file bf16 checkpoint.
    """
    made: list[measure.Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as here:
        tuned = perturbed(Path(base), Path(here) / "tuned")
        arguments = {"base": str(base), "tuned": str(tuned), "folder": here}
        for peer, words in (("mergekit_float32", "float32 compute"), ("mergekit_bfloat16", "bfloat16 compute")):
            a, b = measure.beside(f"{__name__}:ours", f"{__name__}:{peer}", arguments, repeats)
            outputs = [next(Path(here).glob(f"{name}-*")) / "out" for name in ("ours", peer.replace("_", "-"))]
            note = f"mergekit with {words}; {disagreement(*outputs)}"
            made += measure.rows(f"base + a * delta, {words}", a, b, seconds=0.8, peak=0.6, note=note)
        a, b = measure.beside(f"{__name__}:head_edit", f"{__name__}:copy", arguments, repeats)
        note = "the peer reads and writes the same bytes; ours also hashes both sides, loads the copy and compares its logits"
        made += measure.rows(
            "an edit of 4 % of the heads against a plain copy", a, b, seconds=1.5, peak=None, note=note
        )
    return made

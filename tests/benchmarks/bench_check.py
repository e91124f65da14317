"""`surgery check`: its time, and its forecast of memory beside what the writes really took.

python -m tests.benchmarks.bench_check [MEGABYTES ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tests.benchmarks import measure
from tests.benchmarks.bench_write import perturbed

SIZES = (20, 60, 200)  # megabytes
WITHIN = 1.2  # the forecast over the fact, or the other way round


def sized(folder: Path, megabytes: int) -> Path:
    """A random llama of about that many megabytes in bf16: wide and with many tokens, as small models are."""
    import transformers

    from tests.families import characters

    width = 256 if megabytes < 50 else 512
    tokens = int(megabytes * 1e6 * 0.25 / 2 / width)
    inner = 4 * width
    layers = max(2, round(megabytes * 1e6 * 0.75 / 2 / (4 * width * width + 3 * inner * width)))
    config = transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def difference(base: Path, tuned: Path, to: Path) -> Path:
    """TUNED - BASE as a file."""
    from surgery.checkpoint import Checkpoint
    from surgery.delta import save_delta

    a, b = Checkpoint(tuned), Checkpoint(base)
    return save_delta(a - b, to, base_hash=b.hash())


def command_job(words: list[str], folder: str) -> Callable[[], object]:
    """A command's work, into a folder of its own: what `surgery apply` and `surgery merge` do before their records."""
    to = Path(tempfile.mkdtemp(dir=folder)) / "out"

    def call() -> None:
        if words[0] == "merge":
            from surgery.merging import merge, read_recipe

            merge(read_recipe(words[1]), to)
        else:
            from surgery.checkpoint import Checkpoint
            from surgery.delta import StoredDelta
            from surgery.writing import write

            write(Checkpoint(words[1]) + 0.7 * StoredDelta(words[2]), to)
        shutil.rmtree(to)

    return call


def recipe(folder: Path, method: str, base: Path, tuned: Path) -> Path:
    """A merge of three models as YAML."""
    path = folder / f"{method}.yml"
    entries = "".join(
        f"  - model: {m}\n    parameters: {{weight: 0.5, density: 0.5}}\n" for m in (tuned, base.parent / "third")
    )
    path.write_text(
        f"merge_method: {method}\nbase_model: {base}\nmodels:\n{entries}dtype: bfloat16\n", encoding="utf-8"
    )
    return path


def run(folder: Path | str, sizes: Iterable[int] = SIZES) -> list[measure.Row]:
    """Rows of the forecast against the peak of private memory, imports included in both, for each command and size."""
    from surgery.preflight import check_apply, check_recipe

    made: list[measure.Row] = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            here = Path(place)
            base = sized(here / "base", size)
            tuned = perturbed(base, here / "tuned")
            perturbed(base, here / "third", seed=1)
            delta = difference(base, tuned, here / "delta")
            jobs = [
                (
                    "apply",
                    check_apply(str(base), [str(delta)]),
                    ["apply", str(base), str(delta)],
                )
            ]
            for method in ("task_arithmetic", "ties", "dare_ties"):
                path = recipe(here, method, base, tuned)
                jobs.append((f"merge, {method}", check_recipe(path), ["merge", str(path)]))
            for name, report, words in jobs:
                forecast = report.forecast
                if forecast is None or forecast.memory is None:
                    raise RuntimeError(str(report))
                began = time.perf_counter()
                fact = measure.once("tests.benchmarks.bench_check:command_job", {"words": words, "folder": place})
                taken = time.perf_counter() - began
                ratio = max(forecast.memory / fact.peak, fact.peak / forecast.memory)
                made.append(
                    measure.Row(
                        name=f"forecast of memory: {name}, {size} MB",
                        ours=f"{forecast.memory / 2**20:.0f} MiB",
                        peer=f"{fact.peak / 2**20:.0f} MiB",
                        ratio=ratio,
                        limit=WITHIN,
                        note=f"private, imports included; forecast {forecast.seconds:.0f} s, took {taken:.0f} s",
                    )
                )
    return made


def seconds(model: Path | str, repeats: int = 3) -> list[measure.Row]:
    """How long checking a merge of a model with itself under another name takes, the interpreter's start included."""
    import subprocess

    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        for name in ("a", "b", "c"):
            (here / name).symlink_to(Path(model).resolve())
        entries = "".join(f"  - model: {here / n}\n    parameters: {{weight: 0.5, density: 0.5}}\n" for n in "bc")
        (here / "r.yml").write_text(
            f"merge_method: ties\nbase_model: {here / 'a'}\nmodels:\n{entries}", encoding="utf-8"
        )
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "analyses", "check", str(here / "r.yml")],
                cwd=measure.ROOT,
                check=True,
                capture_output=True,
            )
            taken.append(time.perf_counter() - began)
    best = min(taken)
    return [
        measure.Row(
            name="check of a merge of three: time",
            ours=f"{best:.2f} s",
            peer="2 s",
            ratio=best / 2,
            limit=1.0,
            note="the interpreter's start included",
        )
    ]


if __name__ == "__main__":
    from surgery.specimen import specimen

    with tempfile.TemporaryDirectory() as temporary:
        lines = [*seconds(specimen()), *run(temporary, [int(word) for word in sys.argv[1:]] or SIZES)]
    sys.stdout.write(measure.table(lines))

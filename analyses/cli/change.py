"""Commands that change a model, or take a change as a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.given import hash_of, hash_of_tensors
from analyses.cli.options import (
    CHANGE,
    DryRun,
    Dtype,
    ModelRef,
    Quiet,
    Seed,
    To,
    app,
    begin_record,
    require_new,
)
from analyses.cli.written import AllowLoops, Stochastic, write_model

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.edit_lists import Step
    from surgery.record import Record
    from surgery.sites import Site
    from surgery.weights import Delta, Weights


@app.command(rich_help_panel=CHANGE)
def diff(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that changed.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it changed from.")],
    to: To,
    form: Annotated[
        str,
        typer.Option(
            help="auto (whichever exact form is smallest), dense, sparse, low-rank, or lora: an adapter for PEFT."
        ),
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(help="Of low-rank and lora: the most it may be.", min=1, show_default=False)
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of sites to keep, as in '*.attn.*'; may be repeated.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """A task vector as a file: TUNED - BASE, dense, sparse, low-rank, or as a LoRA adapter; what a rank loses is said."""
    record = begin_record("diff", {"tuned": tuned, "base": base, "form": form, "rank": rank, "at": at})
    from surgery.checkpoint import Checkpoint
    from surgery.delta import StoredDelta, save_delta
    from surgery.model import find

    if form not in ("auto", "dense", "sparse", "low-rank", "lora"):
        raise ValueError(f"--form {form}: choose auto, dense, sparse, low-rank or lora.")
    if (rank is None) == (form in ("low-rank", "lora")):
        raise ValueError("--form low-rank and --form lora need --rank, as in --rank 16; no other form has one.")
    require_new(to)
    a, b = Checkpoint(find(tuned)), Checkpoint(find(base))
    vector = (a - b).keep(at) if at else a - b
    if dry_run:
        typer.echo(f"{vector!r} would go to {to}")
        return
    base_hash = b.hash()
    record.inputs = {"tuned": {"ref": tuned, "hash": a.hash()}, "base": {"ref": base, "hash": base_hash}}
    if form == "lora":
        assert rank is not None
        lines = _save_lora(vector, to, b, rank, record)
    else:
        save_delta(vector, to, base_hash=base_hash, form=form, rank=rank, seal=record.save)  # type: ignore[arg-type]
        lines = _lost(StoredDelta(to).errors, vector) if form == "low-rank" else []
    for line in lines:
        typer.echo(line)
    typer.echo(to)


def _save_lora(vector: Delta, to: Path, base: Checkpoint, rank: int, record: Record) -> list[str]:
    """Write what of a vector a LoRA can hold; gives what was lost and what was left out, in words."""
    from surgery.delta import IDENTICAL
    from surgery.lowrank import lora_sites, save_adapter, truncated

    holds = set(lora_sites(base))
    norms = {site: norm for site, norm in vector.norms().items() if norm}
    fit = [site for site in norms if site in holds]
    if not norms:
        raise ValueError(IDENTICAL)
    if not fit:
        first = ", ".join(map(str, list(norms)[:3])) + (", ..." if len(norms) > 3 else "")
        raise ValueError(
            f"What changed is {first}: a LoRA of {base.folder.name} cannot hold that. It holds the matrices of linear layers and embeddings; "
            "another --form holds everything."
        )
    factors, errors = truncated(vector.keep(fit), rank)
    errors |= {site: 1.0 for site in norms if site not in holds}
    record.results = {"errors": {str(site): error for site, error in errors.items()}}
    save_adapter(factors, to, base, seal=record.save)
    return _lost(errors, vector)


@app.command(rich_help_panel=CHANGE)
def apply(
    model: ModelRef,
    to: To,
    add: Annotated[
        list[str],
        typer.Option(
            "--add",
            help="VECTOR:STRENGTH, a delta's or a LoRA adapter's folder or hub id and a number (default 1); may be repeated.",
        ),
    ],
    dtype: Dtype = None,
    stochastic: Stochastic = False,
    seed: Seed = 0,
    allow_loops: AllowLoops = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """MODEL plus task vectors, streamed to a new model folder and verified.

    A language model's vector lands on the language tower of a vision-language model, and between vocabularies of different length on
    the rows that both have; what is left out is said, a line each.
    """
    record = begin_record("apply", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    _refuse_idle_seed(stochastic, seed)
    from surgery.checkpoint import Checkpoint
    from surgery.model import find

    require_new(to)
    base = Checkpoint(find(model))
    base_hash = cache(base.hash)
    point: Weights = base
    notes: list[str] = []
    record.inputs = {}
    for entry in add:
        folder, strength = _strength(entry)
        vector, record.inputs[_role(folder, "model")], said = vector_of(folder, base, base_hash)
        notes += said
        scaled: Delta = strength * vector
        point = point + scaled
    for note in notes:
        typer.echo(note, err=True)
    if dry_run:
        typer.echo(f"{point!r}: {len(point.changed_from(base))} sites of {model} would change; would go to {to}")
        return
    record.results = {"notes": notes}
    written = write_model(
        record,
        point,
        to,
        model=model,
        dtype=dtype,
        stochastic=stochastic,
        seed=seed,
        allow_loops=allow_loops,
        quiet=quiet,
    )
    typer.echo(written)


@app.command(rich_help_panel=CHANGE)
def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file in mergekit's format, unchanged.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the merged model.", show_default=False)],
    seed: Annotated[
        int | None,
        typer.Option(help="Of random methods (DARE, DELLA); by default the recipe's own, else 0.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Store as float32, bfloat16 or float16; by default the recipe's out_dtype, else its dtype, else as found.",
            show_default=False,
        ),
    ] = None,
    multi_gpu: Annotated[
        bool, typer.Option("--multi-gpu", help="Let mergekit's own executor use every GPU, instead of our stream.")
    ] = False,
    allow_loops: AllowLoops = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Merge models as a mergekit recipe says: every method of the installed mergekit, streamed and verified."""
    record = begin_record("merge", {k: v for k, v in locals().items() if k not in ("to", "seed", "dry_run", "quiet")})

    from surgery.card import CARD, model_card
    from surgery.hashing import hash_bytes
    from surgery.merging import MergedModel, merge, plan, read_recipe
    from surgery.rounding import as_dtype

    require_new(to)
    read = read_recipe(recipe)
    if dry_run:
        typer.echo(plan(read, seed=seed, dtype=as_dtype(dtype), multi_gpu=multi_gpu))
        typer.echo(f"would go to {to}")
        return
    chosen = read.seed if seed is None else seed
    record.arguments |= {"recipe": read.text, "seed": chosen}  # so that a replay needs no file
    record.seeds = {"seed": chosen}

    def seal(folder: Path, merged: MergedModel) -> None:
        record.inputs = {
            _role(ref, "recipe"): {"ref": ref, "hash": digest} for ref, digest in merged.input_hashes().items()
        }
        ref = "recipe" if "\n" in recipe else recipe
        record.inputs["recipe"] = {"ref": ref, "hash": hash_bytes(read.text.encode())}
        record.checks, record.results = merged.checks, {"recipe": read.text, **merged.as_dict()}
        source = merged.sources[read.models[0]][0]
        (folder / CARD).write_text(model_card(record, merged, source), encoding="utf-8")
        record.save(folder, reproducible=["*.safetensors"])

    loops = "report" if allow_loops else "refuse"
    merged = merge(
        read, to, seed=seed, dtype=as_dtype(dtype), multi_gpu=multi_gpu, loops=loops, seal=seal, progress=not quiet
    )
    if read.unused:
        typer.echo(f"note: {read.method} has no parameter {', '.join(read.unused)}: ignored, as by mergekit", err=True)
    typer.echo(merged)


@app.command(rich_help_panel=CHANGE)
def edit(
    model: ModelRef,
    to: To,
    edits: Annotated[
        str | None,
        typer.Option("--edits", metavar="FILE", help="A YAML list of edits, done first.", show_default=False),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale", metavar="SITES:FACTOR", help="As in '12.mlp.down:0.5'; may be repeated.", show_default=False
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove",
            metavar="DIRECTION",
            help="What is no longer to be written: FILE.safetensors, FILE.safetensors:NAME, FILE.json, or the folder of `surgery direction`.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="Where --remove acts: a pattern of sites such as '*.attn.o' or '14.attn.o.h3'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option(
            "--heads",
            metavar="SHARE",
            help="In place of --at: --remove a length direction from this share of all heads, those that write most of its brief side "
            "in --runs, as `surgery heads` ranks them; in (0, 1].",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            help="Of --heads: answers, a file of `surgery generate` or its folder; not those the direction is from.",
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        str | None, typer.Option(help="Of --heads: what is read, default thinking; or answer.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of --remove: 1 (the default) removes, 2 reflects.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of --heads: auto (the default), cpu, cuda, mps.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    stochastic: Stochastic = False,
    seed: Seed = 0,
    allow_loops: AllowLoops = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """MODEL with edits: scaled, directions removed or added, ranks truncated, layers swapped; streamed and verified.

    They are done in this order: --edits, --scale, --remove. Heads are ranked in MODEL as it is, before any of them. A direction that was
    measured in another model is refused.
    """
    record = begin_record("edit", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    _refuse_idle_seed(stochastic, seed)
    from surgery.checkpoint import Checkpoint
    from surgery.edit_lists import Step, read_edit, read_edits
    from surgery.model import find

    steps: list[Step] = read_edits(Path(edits)) if edits else []
    for entry in scale or []:
        steps.append(read_edit({"scale": _scaling(entry)}, f"--scale {entry}"))
    ranked = _ranking(remove, at, heads, runs, over, strength, device)
    if remove is not None and ranked is None:
        where = at[0] if at is not None and len(at) == 1 else at
        fields = {"direction": remove, "at": where, "strength": strength}
        given = {key: value for key, value in fields.items() if value is not None}
        steps.append(read_edit({"remove": given}, f"--remove {remove}"))
    if not steps and ranked is None:
        raise ValueError(
            "No edit is asked for: give --edits FILE, --scale SITES:FACTOR, or --remove DIRECTION with --at SITES or --heads SHARE."
        )
    require_new(to)
    _require_measured_in(model, steps)
    found: dict[str, Any] = {}
    table: Any = None
    if ranked is not None:
        from analyses.cli.think import found_heads

        _, chosen, found = found_heads(model, *ranked, device=device or "auto", quiet=quiet)
        names = [str(site) for site in chosen.heads()]
        steps.append(
            Step(chosen.edit(), tuple(names), f"remove: {remove} from {', '.join(names)}", f"--remove {remove}")
        )
        record.results, table = {"heads": names}, chosen.frame()
    base = Checkpoint(find(model))
    point: Weights = base
    for step in steps:
        touched = step.sites(point)
        if dry_run:
            typer.echo(f"{step.text}: {len(touched)} site{'' if len(touched) == 1 else 's'}")
            for site in touched:
                typer.echo(f"  {site} {tuple(base.shape(site))}")
        point = step(point)
    if dry_run:
        typer.echo(f"{len(point.changed_from(base))} sites of {model} would change; would go to {to}")
        return
    files = [*([Path(edits)] if edits else []), *(path for step in steps for path in step.files)]
    record.inputs = found | {str(path): {"ref": str(path), "hash": hash_of(path)} for path in files}
    written = write_model(
        record,
        point,
        to,
        model=model,
        dtype=dtype,
        stochastic=stochastic,
        seed=seed,
        allow_loops=allow_loops,
        quiet=quiet,
        also=None if table is None else lambda folder: table.to_csv(folder / "heads.csv", index=False),
        reproducible=["*.safetensors", "heads.csv"],
    )
    typer.echo(written)


def _require_measured_in(model: str, steps: Iterable[Step]) -> None:
    """Raise ValueError for a direction to be removed that says of itself that it was measured in another model."""
    from probes.directions import Direction

    known = []
    for step in steps:
        if isinstance(getattr(step.edit, "direction", None), Mapping):
            try:
                known += [Direction.load(path) for path in step.files]
            except ValueError:  # vectors named by sites, and nothing that says where they are from
                continue
    if any("model" in direction.about for direction in known):
        from surgery.model import Model

        loaded = Model.load(model, device="cpu")
        for direction in known:
            direction.require(loaded)


def _refuse_idle_seed(stochastic: bool, seed: int) -> None:
    if seed and not stochastic:
        raise ValueError("--seed is of --stochastic: without it nothing is drawn.")


def _scaling(entry: str) -> dict[str, Any]:
    sites, _, factor = entry.rpartition(":")
    try:
        number = float(factor)
    except ValueError:
        number = math.nan
    if not sites or not math.isfinite(number):
        raise ValueError(
            f"--scale {entry}: sites and then a factor, a finite number, are needed, as in 12.mlp.down:0.5; the factor here is {factor!r}."
        )
    return {"factor": number, "at": sites}


def _ranking(
    remove: str | None,
    at: list[str] | None,
    heads: float | None,
    runs: str | None,
    over: str | None,
    strength: float | None,
    device: str | None,
) -> tuple[str, str, dict[str, Any]] | None:
    """Direction, answers and options of the recipe by which heads are ranked, or None where none are. Options that do nothing are refused."""
    if remove is None and (at is not None or strength is not None or heads is not None):
        raise ValueError(
            "--at, --heads and --strength say where and how strongly --remove acts; without it they do nothing."
        )
    if heads is None:
        for option, value in (("--runs", runs), ("--over", over), ("--device", device)):
            if value is not None:
                raise ValueError(f"{option} is of --heads, which ranks heads in answers; without it, it does nothing.")
        return None
    assert remove is not None
    if at is not None:
        raise ValueError("--at and --heads both say where --remove acts: give one of them.")
    if runs is None:
        raise ValueError(
            "--heads ranks heads by what they write in answers: give --runs, as `surgery generate` writes them. For heads by name, give "
            "--at 14.attn.o.h3, which may be repeated."
        )
    return remove, runs, {"over": over or "thinking", "share": heads, "strength": 1.0 if strength is None else strength}


@app.command(rich_help_panel=CHANGE)
def realign(
    model: ModelRef,
    change: Annotated[
        str,
        typer.Option(
            help="What fine-tuning changed: a LoRA adapter's folder, or a delta's (`surgery diff`).", show_default=False
        ),
    ],
    base: Annotated[str, typer.Option(help="The model before alignment.", show_default=False)],
    aligned: Annotated[str, typer.Option(help="The model after alignment.", show_default=False)],
    to: To,
    safe: Annotated[
        str | None,
        typer.Option(
            help="A change tuned on safety data, as --change: SafeMERGE, which mixes the two.", show_default=False
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="threshold: the modules up to --tau; count: the --count least like alignment.")
    ] = "threshold",
    tau: Annotated[
        float | None,
        typer.Option(help="Cosine with alignment, in [0, 1]; default 0.5, with --safe 0.35.", show_default=False),
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many modules; default 10.", min=1, show_default=False)] = None,
    projection: Annotated[
        str | None, typer.Option(help="paper (the default), exact, or the control shrink.", show_default=False)
    ] = None,
    cut: Annotated[
        float | None,
        typer.Option(help="exact: smallest singular value that counts, as a share of the largest.", show_default=False),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(help="--safe: share of the change against the safe one; default 0.8.", show_default=False),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="--safe: exact (the default), or peft, which adds factors.", show_default=False)
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="Pattern of modules to judge; by default all in the layers.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    allow_loops: AllowLoops = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """MODEL plus a change that is brought back towards alignment where it left it: SafeLoRA, or with --safe SafeMERGE."""
    record = begin_record("realign", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    from surgery.checkpoint import Checkpoint
    from surgery.model import find
    from surgery.realign import SAFE_WEIGHT, safelora, safemerge

    if mode not in ("threshold", "count"):
        raise ValueError(f"--mode {mode}: choose threshold or count.")
    idle = {"--tau": tau if mode == "count" else None, "--count": count if mode == "threshold" else None}
    idle |= {"--weight": weight, "--form": form} if safe is None else {"--projection": projection, "--cut": cut}
    for option, value in idle.items():
        if value is not None:
            raise ValueError(
                f"{option} has no use with --mode {mode} {'without' if safe is None else 'and'} --safe; leave it out."
            )
    for option, value, words in (
        ("--projection", projection, ("paper", "exact", "shrink")),
        ("--form", form, ("exact", "peft")),
    ):
        if value not in (None, *words):
            raise ValueError(f"{option} {value}: choose {', '.join(words)}.")
    require_new(to)
    start = Checkpoint(find(model))
    before, after = Checkpoint(find(base)), Checkpoint(find(aligned))
    chosen: dict[str, Any] = {"count": 10 if count is None else count} if mode == "count" else {"tau": tau}
    chosen |= {"at": at, "progress": not quiet}
    vector, vector_input = _change_in(change, start)
    record.inputs = {"change": vector_input}
    if safe is None:
        options = {"projection": projection or "paper", "cut": cut}
        found = safelora(vector, after - before, **chosen, **options)
    else:
        safe_vector, record.inputs["safe"] = _change_in(safe, start)
        options = {"weight": SAFE_WEIGHT if weight is None else weight, "form": form or "exact"}
        found = safemerge(vector, safe_vector, after - before, **chosen, **options)
    table = found.frame()
    if dry_run:
        typer.echo(
            table[["site", "rho", "norm_before", "norm_after", "realigned"]].to_string(index=False, float_format="%.4g")
        )
        typer.echo(f"{found}; would go to {to}")
        return
    record.inputs |= {"base": {"ref": base, "hash": before.hash()}, "aligned": {"ref": aligned, "hash": after.hash()}}
    record.results = {**found.summary(), "tau": found.tau}
    written = write_model(
        record,
        start + found.delta,
        to,
        model=model,
        dtype=dtype,
        allow_loops=allow_loops,
        quiet=quiet,
        also=lambda folder: table.to_csv(folder / "similarity.csv", index=False),
        reproducible=["*.safetensors", "similarity.csv"],
    )
    typer.echo(found)
    typer.echo(written)


def vector_of(
    ref: str, base: Checkpoint, base_hash: Callable[[], str] | None = None
) -> tuple[Delta, dict[str, str], list[str]]:
    """The change in a folder as it lands on a model, its entry in the record, and what a reader should know of it, in words.

    base_hash: of the model, where it is asked for more than once.
    """
    from surgery.across import land
    from surgery.lowrank import Adapter

    vector, entry = _change_in(ref, base)
    landed = land(vector, base, base=_measured_from(_folder_of(ref)))
    foreign = "base" in entry and entry["base"] != (base_hash or base.hash)()
    notes = [f"note: {ref} was measured from another base than this model"] if foreign else []
    lines = [*(vector.notes if isinstance(vector, Adapter) else []), *landed.in_words()]
    return landed.delta, entry, notes + [f"note: {ref}: {line}" for line in lines]


def _measured_from(folder: Path) -> Path | None:
    """The folder of the model a vector was measured from, where its record knows one that is still there."""
    from surgery.preflight.facts import locate
    from surgery.record import RECORD, Record

    if not (folder / RECORD).is_file():
        return None
    ref = Record.load(folder).inputs.get("base", {}).get("ref", "")
    there = locate(ref)[0] if ref else None
    return there if there and (there / "config.json").is_file() else None


def _lost(errors: Mapping[Site, float], vector: Delta) -> list[str]:
    """What a rank lost of a vector, and what was left out of it, in words. errors: relative, 1 where a site is left out."""
    norms = {site: norm for site, norm in vector.norms().items() if site in errors}
    kept = [site for site in norms if errors[site] < 1]
    out = [site for site in norms if errors[site] == 1 and norms[site]]
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    lost = sum((errors[site] * norms[site]) ** 2 for site in kept) ** 0.5
    inside = sum(norms[site] ** 2 for site in kept) ** 0.5
    lines = ["No matrix is smaller as factors of that rank: each is stored as it is."]
    if kept:
        worst = max(kept, key=lambda site: errors[site])
        lines = [
            f"{len(kept)} matrices; relative error {lost / inside:.4g} over all, at most {errors[worst]:.4g}, at {worst}"
        ]
    if out:
        share = sum(norms[site] ** 2 for site in out) ** 0.5 / whole
        names = ", ".join(map(str, out[:6])) + (", ..." if len(out) > 6 else "")
        lines.append(f"left out, {share:.2%} of the vector's norm: {len(out)} sites, {names}")
    return lines


def _role(folder: str, taken: str) -> str:
    """What an input is called in the record: its folder, unless another input is called so already."""
    return f"./{folder}" if folder == taken else folder


def _strength(entry: str) -> tuple[str, float]:
    folder, colon, number = entry.rpartition(":")
    if not colon or Path(entry).is_dir():
        return entry, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"--add {entry}: after the last colon comes a finite number, as in {folder}:0.7.")
    return folder, strength


def _folder_of(ref: str) -> Path:
    """Where a delta or an adapter is: in the folder of that name, else in the hub's cache, into which it is downloaded."""
    from surgery.hub_ids import hub_id
    from surgery.model import find

    return find(ref) if hub_id(ref) is not None else Path(ref)


def _change_in(ref: str, base: Checkpoint) -> tuple[Delta, dict[str, str]]:
    """The vector in a folder or under a hub id, a delta's or a LoRA adapter's, and its entry in a record."""
    from surgery.adapter_names import CONFIG, WEIGHTS
    from surgery.delta import StoredDelta
    from surgery.hashing import hash_bytes
    from surgery.headers import DELTA
    from surgery.lowrank import Adapter

    folder = _folder_of(ref)
    if (folder / CONFIG).is_file():
        settings = (folder / CONFIG).read_bytes()  # alpha, for one
        return Adapter(folder, base), {
            "ref": ref,
            "hash": hash_bytes(settings + hash_of_tensors(folder / WEIGHTS).encode()),
            **_recorded_base(folder),
        }
    vector = StoredDelta(folder)
    return vector, {
        "ref": ref,
        "hash": hash_of_tensors(folder / DELTA),
        **({"base": vector.base_hash} if vector.base_hash else {}),
    }


def _recorded_base(folder: Path) -> dict[str, str]:
    """The hash of the model that an adapter was measured from, where `surgery diff` wrote it."""
    from surgery.record import RECORD, Record

    if not (folder / RECORD).is_file():
        return {}
    record = Record.load(folder)
    known = record.hash == Record.hash and record.inputs.get("base", {}).get("hash")
    return {"base": known} if known else {}

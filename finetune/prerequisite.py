"""Prerequisite learning: one adapter learns what must be known, another what is to be done with it, and only the second is kept.

    done = prereq_tune(model, knowledge={"a": statements, "b": others}, skill={"a": answers, "b": other_answers})
    with model.installed(model.weights + done.skill): ...

A model that is tuned on answers whose facts it does not know learns to answer what it does not know. Here the facts are there while the
skill is learnt, in an adapter of their own, and gone afterwards.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.checkpoints import digest, discard, last_complete, require_same_run, require_somewhere
from finetune.examples import Collate, Example, Item, Over, examples, rows_of
from finetune.hosts import Surgical
from finetune.learner import (
    adapted_layers,
    as_before,
    one_device,
    require_no_engine,
    require_norm,
    require_one_process,
    require_versions,
)
from finetune.objectives import nll
from surgery.lowrank import Factored
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.sites import Site
from surgery.tensorfile import TensorFile, save_whole
from surgery.weights import linear_sites

_VERSION, _SKILL = "version", "skill"
_ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class Prerequisite:
    """The adapters as vectors of low rank: ``model.weights + done.skill`` is the model to use.

    skill:     what was learnt with the knowledge in place. knowledge: what each version's statements taught, by version.
    losses:    of every optimizer step, by stage: ``knowledge a``, ..., ``skill``.
    versions:  which version was in place at each step of the skill.
    """

    skill: Factored
    knowledge: Mapping[str, Factored]
    losses: Mapping[str, list[float]]
    versions: tuple[str, ...]


def prereq_tune(
    model: Model,
    knowledge: Mapping[str, Sequence[Item]],
    skill: Mapping[str, Sequence[Item]],
    *,
    knowledge_steps: int = 60,
    skill_steps: int = 60,
    knowledge_rank: int = 32,
    skill_rank: int = 64,
    knowledge_lr: float = 1e-3,
    skill_lr: float = 1e-3,
    batch_size: int = 16,
    schedule: str = "linear",
    max_grad_norm: float = 1.0,
    knowledge_over: Over = "completion",
    skill_over: Over = "completion",
    autocast: bool = True,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    save_every: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Prerequisite:
    """Learn knowledge and skill in two LoRA adapters of every attention and MLP matrix; the model itself is left as it was.

    knowledge: version -> the statements of its facts, each learnt in an adapter of its own. Several versions that contradict each other
               (fictitious facts) keep the skill from learning any of them.
    skill:     version -> the task's data with the facts of that version. Each batch is of one version, drawn; that version's adapter
               is in place, frozen, and the skill's adapter alone is trained.
    knowledge_steps, knowledge_rank, knowledge_lr, knowledge_over, and likewise of the skill: optimizer steps, rank (alpha is twice it),
    peak learning rate, and the spans with a loss. batch_size: examples a step, of a version with fewer all of them.
    schedule: of the learning rate, transformers' names. max_grad_norm: 0 does not clip. autocast: compute in bf16.
    checkpoints: a folder that keeps the adapter of every finished stage, and with `save_every` a checkpoint within a stage every so many of
               its steps; the same call then goes on where it was stopped, and gives the same bits. callbacks: of the trainer of every stage.

    Batch j of a stage depends on ``(seed, j)`` alone. Raises ValueError where the versions of knowledge and skill are not the same, for
    numbers below 1, for a model whose experts are one tensor together, for a folder of another run, and under a launcher that asks for FSDP or
    DeepSpeed; RuntimeError under a launcher of several processes; FloatingPointError where a loss is not finite.
    Source: Liu et al. 2024 (arXiv 2410.19290), Prereq-Tune: ranks 32 and 64, multi-version.
    Differs: learning rates and lengths are ours (the paper: 3e-5, 15 and 50 epochs of 8-billion-parameter models).
    """
    require_versions("peft")
    if not knowledge or set(knowledge) != set(skill):
        raise ValueError(
            f"The skill must be learnt with the facts it needs: knowledge has the versions {sorted(knowledge)}, skill {sorted(skill)}."
        )
    counts = {
        "knowledge_steps": knowledge_steps, "skill_steps": skill_steps, "knowledge_rank": knowledge_rank, "skill_rank": skill_rank,
        "batch_size": batch_size,
    }  # fmt: skip
    require_somewhere(save_every, checkpoints)
    if low := [f"{name}={value}" for name, value in counts.items() if value < 1]:
        raise ValueError(f"{', '.join(low)}: each is at least 1.")
    require_norm(max_grad_norm)
    require_one_process("prereq_tune")
    require_no_engine("prereq_tune")
    names = {version: f"knowledge{k}" for k, version in enumerate(knowledge)}  # PEFT's names take no dots
    facts = {version: [e for (e,) in _alone(data, knowledge_over)] for version, data in knowledge.items()}
    tasks = {version: [e for (e,) in _alone(data, skill_over)] for version, data in skill.items()}
    weights, layers = model.weights, adapted_layers(model)
    sites = linear_sites(weights)
    losses: dict[str, list[float]] = {}
    settings = {
        **counts, "knowledge_lr": knowledge_lr, "skill_lr": skill_lr,
        "schedule": schedule, "max_grad_norm": max_grad_norm, "autocast": autocast, "seed": seed, "start": fingerprint(model),
        "knowledge": _known(facts), "skill": _known(tasks),
    }  # fmt: skip
    how = _Training(model, schedule, max_grad_norm, autocast, seed, settings, save_every, tuple(callbacks))
    with ExitStack() as borrowed:
        kept = Path(checkpoints) if checkpoints else Path(borrowed.enter_context(tempfile.TemporaryDirectory()))
        module = borrowed.enter_context(as_before(model.module))
        torch.manual_seed(seed)  # adapters begin at random
        learner = _with_adapters(module, layers, {**dict.fromkeys(names.values(), knowledge_rank), _SKILL: skill_rank})
        borrowed.callback(learner.unload)
        for version, name in names.items():
            batches = batches_of({version: facts[version]}, knowledge_steps, batch_size, seed)
            losses[f"knowledge {version}"] = _stage(
                how, kept / name, learner, batches, {version: [name]}, name, knowledge_lr
            )
        batches = batches_of(tasks, skill_steps, batch_size, seed)
        active = {version: [name, _SKILL] for version, name in names.items()}
        losses[_SKILL] = _stage(how, kept / _SKILL, learner, batches, active, _SKILL, skill_lr)
        return Prerequisite(
            _vector(module, weights.anatomy, sites, _SKILL),
            {version: _vector(module, weights.anatomy, sites, name) for version, name in names.items()},
            losses,
            tuple(version for version, _ in batches),
        )


def batches_of(
    data: Mapping[str, Sequence[Example]], steps: int, batch_size: int, seed: int
) -> list[tuple[str, tuple[Example, ...]]]:
    """So many batches, each of one version, drawn, without an example twice. Batch j depends on ``(seed, j)`` alone."""
    versions, found = list(data), []
    for step in range(steps):
        rng = random.Random(f"prerequisite {seed} {step}")
        version = rng.choice(versions)
        members = rng.sample(range(len(data[version])), min(batch_size, len(data[version])))
        found.append((version, tuple(data[version][i] for i in members)))
    return found


def _alone(data: Sequence[Item], over: Over) -> list[tuple[Example, ...]]:
    groups = examples(data, over)
    if any(len(group) > 1 for group in groups):
        raise ValueError("Prerequisite learning compares nothing: give transcripts or examples, not groups of them.")
    return groups


def _with_adapters(module: nn.Module, layers: list[str], ranks: Mapping[str, int]) -> Any:
    from peft import LoraConfig, get_peft_model

    learner: Any = None
    for name, rank in ranks.items():
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, lora_dropout=0.0, task_type="CAUSAL_LM")
        if learner is None:
            learner = get_peft_model(module, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            learner.add_adapter(name, config)
    return learner


def _activate(learner: Any, names: list[str], trained: str) -> None:
    """Put some adapters in place together; gradients are one's alone."""
    learner.base_model.set_adapter(names)
    learner.set_requires_grad([name for name in names if name != trained], requires_grad=False)


@dataclass(frozen=True)
class _Training:
    """What the stages have in common. settings: of the whole run, which its files carry."""

    model: Model
    schedule: str
    max_grad_norm: float
    autocast: bool
    seed: int
    settings: Mapping[str, Any]
    save_every: int | None
    callbacks: tuple[Any, ...]


def _stage(
    how: _Training, folder: Path, learner: Any, batches: Sequence[tuple[str, tuple[Example, ...]]], active: Mapping[str, list[str]],
    trained: str, lr: float,
) -> list[float]:  # fmt: skip
    """Train one adapter, others in place as each batch's version says, or take it from the folder where it was finished; the losses of its
    steps."""
    done = folder / _ADAPTER
    if done.is_file():
        file = TensorFile(done)
        require_same_run(folder, json.loads(file.metadata["settings"]), how.settings)
        _put(learner, trained, file)
        return json.loads(file.metadata["losses"])
    losses = _trained(how, folder, learner, batches, active, trained, lr)
    save_whole(
        done,
        _numbers(learner, trained),
        {"settings": json.dumps(how.settings), "losses": json.dumps(losses)},
    )
    discard(folder)  # the adapter is whole
    return losses


def _trained(
    how: _Training, folder: Path, learner: Any, batches: Sequence[tuple[str, tuple[Example, ...]]], active: Mapping[str, list[str]],
    trained: str, lr: float,
) -> list[float]:  # fmt: skip
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    versions = list(active)
    rows = rows_of(
        [tuple(replace(e, columns={_VERSION: float(versions.index(v))}) for e in batch) for v, batch in batches]
    )

    class Stage(Surgical, Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            save_whole(Path(str(output_dir)) / _ADAPTER, _numbers(learner, trained), {})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            _put(learner, trained, TensorFile(Path(resume_from_checkpoint) / _ADAPTER))

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(rows)  # the batches are drawn already

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            _activate(learner, active[versions[int(inputs[_VERSION][0])]], trained)
            return super().compute_loss(model, inputs, *rest, **more)

    _activate(learner, next(iter(active.values())), trained)
    resume = last_complete(folder, how.settings)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=len(batches), per_device_train_batch_size=1, learning_rate=lr, lr_scheduler_type=how.schedule,
        max_grad_norm=how.max_grad_norm, weight_decay=0.0, seed=how.seed, data_seed=how.seed, bf16=how.autocast,
        use_cpu=how.model.device.type == "cpu", logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="steps" if how.save_every else "no", save_steps=how.save_every or len(batches), save_total_limit=2, report_to=[],
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        dataloader_pin_memory=how.model.device.type == "cuda",
    )  # fmt: skip
    one_device(arguments, how.model.device)
    trainer = Stage(
        model=learner,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=Collate(how.model.pad_id),
        callbacks=list(how.callbacks),
        objective=nll,
        settings=how.settings,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _numbers(learner: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The parameters of one adapter, by name."""
    return {name: p.detach() for name, p in learner.named_parameters() if f".{adapter}." in name and "lora_" in name}


@torch.no_grad()
def _put(learner: Any, adapter: str, file: TensorFile) -> None:
    for name, parameter in _numbers(learner, adapter).items():
        parameter.copy_(file[name])


def _known(data: Mapping[str, Sequence[Example]]) -> str:
    told = {version: [(list(e.transcript.ids), e.weights) for e in members] for version, members in data.items()}
    return digest(told)


def _vector(module: nn.Module, anatomy: Any, sites: Sequence[Site], name: str) -> Factored:
    pairs = {}
    for site in sites:
        place = anatomy.places[site]
        layer: Any = module.get_submodule(place.name.removesuffix(".weight"))
        up = layer.scaling[name] * layer.lora_B[name].weight.detach().float()
        down = layer.lora_A[name].weight.detach().float().clone()
        pairs[site] = (up if place.rows is None else up[place.rows], down)
    return Factored(pairs)

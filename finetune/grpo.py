"""`grpo` teaches a model by rewards: several completions of each question, each judged against the mean of its group.

The trainer is TRL's GRPOTrainer; what is ours is the sampling (sample j of a question depends on the seed, the step and the question's
place in it alone), rewards over transcripts, LIFT, and a stop where rewards never differ. As `tune` it changes the weights and nothing else.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor

from finetune.checkpoints import digest, last_complete, require_somewhere
from finetune.hosts import Surgical, Term, reports_in_runs, within
from finetune.learner import (
    Adapter,
    Trains,
    bar,
    check_budget,
    learner,
    one_device,
    require_no_engine,
    require_norm,
    require_versions,
)
from finetune.lift import Select
from finetune.monitors import read_log
from finetune.pieces import are_pieces
from finetune.predictions import logits_at
from finetune.rewards import Reward, Weighted, described
from finetune.rules import DRIFT
from finetune.tune import DEFAULTS, Tuned, course, named
from surgery.borrowing import evaluating
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.seeds import seed_from_numbers
from surgery.transcript import Transcript, read_transcript
from surgery.whole import write_whole

if TYPE_CHECKING:
    from pandas import DataFrame

Loss = Literal["dapo", "grpo", "dr_grpo", "bnpo"]
Scale = Literal["group", "batch", "none"]
LEARNING_RATES: dict[Trains, float] = {"lift": 2e-4, "full": 1e-5, "lora": 2e-4, "shira": 2e-4}
_PART = "rewards/"


@dataclass(frozen=True)
class Round:
    """The completions of one optimizer step.

    reward:   mean over the completions that were scored. parts: the same for each part of a `Weighted` reward, without its weight; NaN where
              none was.
    flat:     share in [0, 1] of the groups all of whose rewards are equal: they give no gradient.
    unscored: completions for which the reward abstained.
    length:   mean tokens of a completion. cut: share in [0, 1] that the cap cut off.
    entropy:  of the next token, in nats, mean over the completions' tokens of each micro-batch (of each process) and then over micro-batches.
    kl:       from the starting model, in nats a token (its k3 estimate), mean alike; NaN where beta is 0.
    """

    step: int
    reward: float
    parts: Mapping[str, float]
    flat: float
    unscored: int
    length: float
    cut: float
    entropy: float
    kl: float


@dataclass(frozen=True)
class Reinforced(Tuned):
    """What a run of `grpo` did: a `Tuned` (method: what was trained; losses: the surrogate, near 0 by construction) and its rounds.

    settings["start"] is a hash of the weights that the run began from.
    """

    rounds: tuple[Round, ...] = ()

    def frame(self) -> DataFrame:
        """A row a step: step, reward, a column ``reward of NAME`` a part, flat, unscored, length, cut, entropy, kl, loss, gradient_norm."""
        import pandas as pd

        rows = []
        for found, loss, norm in zip(self.rounds, self.losses, self.gradient_norms, strict=True):
            plain = {name: value for name, value in vars(found).items() if name != "parts"}
            parts = {f"reward of {name}": value for name, value in found.parts.items()}
            rows.append(plain | parts | {"loss": loss, "gradient_norm": norm})
        return pd.DataFrame(rows)


def grpo(
    model: Model,
    questions: Sequence[Any],
    reward: Reward,
    *,
    trains: Trains = "lift",
    steps: int = 60,
    groups: int = 8,
    samples: int = 8,
    accumulate: int = 1,
    lr: float | None = None,
    beta: float = 0.0,
    loss: Loss = "dapo",
    scale_rewards: Scale = "group",
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    density: float | None = None,
    lora_rank: int | None = None,
    filter_rank: int = 16,
    refresh: int | None = None,
    select: Select = "largest",
    options: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    schedule: str = "constant_with_warmup",
    warmup: int = 0,
    max_grad_norm: float = 1.0,
    autocast: bool = True,
    patience: int = 10,
    vllm: bool | None = None,
    terms: Sequence[Term] = (),
    callbacks: Sequence[Any] = (),
    seed: int = 0,
    log: str | Path | None = None,
    report_to: Sequence[str] = (),
    checkpoints: str | Path | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> Reinforced:
    """Reinforce what is rewarded, in place.

    questions:  texts, or objects that have the text as ``question``; each step asks `groups` of them.
    reward:     ``(question, transcript) -> number``, or None to abstain (see `finetune.rewards`).
    trains:     what is trained, as the method of `tune`: "lift", "full", "lora" or "shira"; density, lora_rank, filter_rank,
                refresh and select likewise. options: further ones of `LIFT` (block, scope, overrides, min_change, grow_to, agreement).
    groups, samples: questions a step, and completions of each, 2 or more; `accumulate` micro-batches share their ``groups * samples``.
    lr:         by default 2e-4, 1e-5 for full. schedule, warmup, weight_decay, max_grad_norm: as in `tune`.
    beta:       weight of the KL from the starting model, 0 or more.
    loss:       over what the surrogate is averaged: "dapo" all tokens of the step, "grpo" tokens of each completion and then completions,
                "bnpo" tokens of the micro-batch, "dr_grpo" all places up to max_new_tokens.
    scale_rewards: advantages are divided by the standard deviation of the "group", of the "batch", or by nothing ("none").
    temperature: of sampling, above 0, and of the probabilities in the loss.
    patience:   where in the first so many steps no group's rewards have differed, the run stops with an error; at the end of a shorter run too.
    vllm:       whether vLLM samples; by default where it is installed, on a GPU, for a model that was loaded from a folder. Its samples
                depend on the batch.
    log:        a file for every completion, a JSON line each: step, question, sample, text, completion, tokens, finished, reward, parts.
    terms, callbacks, seed, autocast, report_to, checkpoints, save_every, progress: as in `tune`; a resumed run goes on bit for bit.

    Each step is on-policy: its completions are drawn from the weights it changes, without dropout in either, so probability ratios are 1
    and clipping has no say.

    Under torchrun (DDP) all processes call this alike, each answers its part of a step's questions with a group's completions together, and
    every one has the tuned weights in the end; groups stays the count of a step, all processes together, and the run is that of one process.
    The first alone writes log and checkpoints. vLLM was not tried there.

    Raises ValueError for settings out of range, fewer questions than groups, a reward that is not finite, and rewards that never differ
    within a group, and under a launcher that asks for FSDP or DeepSpeed; ImportError for vLLM where it is not installed, and a TRL without
    rollout functions; FloatingPointError as `tune`.
    Source: Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1, equations 3 and 4.
    Differs: the KL is multiplied by the probability ratio, which corrects its gradient (DeepSeek-V3.2, arXiv 2512.02556), as TRL does;
        samples are the same in any batch.
    """
    require_versions("trl", "peft")
    require_no_engine("grpo")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    _check(
        trains, steps, groups, samples, accumulate, beta, loss, scale_rewards, temperature, max_new_tokens, patience, processes
    )  # fmt: skip
    require_norm(max_grad_norm)
    more = {
        name: value
        for name, value in {"filter_rank": filter_rank, "refresh": refresh, "select": select}.items()
        if value != DEFAULTS[name]
    } | dict(options or {})
    check_budget(model, trains, density, lora_rank, more)
    _check_data(questions, groups, save_every, checkpoints)
    peak = LEARNING_RATES[trains] if lr is None else lr
    served = _served(vllm, model)
    settings = {
        "method": "grpo", "trains": trains, "steps": steps, "groups": groups, "samples": samples, "accumulate": accumulate, "lr": peak,
        "beta": beta, "loss": loss, "scale_rewards": scale_rewards, "temperature": temperature, "max_new_tokens": max_new_tokens,
        "density": density, "lora_rank": lora_rank, "filter_rank": filter_rank, "refresh": refresh, "select": select,
        "options": dict(options or {}), "weight_decay": weight_decay,
        "schedule": schedule, "warmup": warmup, "max_grad_norm": max_grad_norm, "autocast": autocast, "patience": patience,
        "vllm": served, "seed": seed, "reward": described(reward), "data": digest([repr(q) if is_dataclass(q) else _text(q) for q in questions]), "start": fingerprint(model),
        "terms": [named(t) for t in terms], "DRIFT": any(isinstance(c, DRIFT) for c in callbacks), "processes": processes,
    }  # fmt: skip

    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOConfig

    with ExitStack() as borrowed:
        borrowed.enter_context(_speech_as_before(model))
        folder = Path(checkpoints) if checkpoints else Path(borrowed.enter_context(tempfile.TemporaryDirectory()))
        args = GRPOConfig(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=groups * samples // (accumulate * processes),
            gradient_accumulation_steps=accumulate, num_generations=samples, max_completion_length=max_new_tokens,
            learning_rate=peak, lr_scheduler_type=schedule, warmup_steps=warmup, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, seed=seed, data_seed=seed, bf16=autocast, use_cpu=model.device.type == "cpu",
            beta=0.0, use_bias_correction_kl=True, loss_type=loss, scale_rewards=scale_rewards, temperature=temperature,
            activation_checkpointing=False, logging_steps=1, logging_nan_inf_filter=False, save_strategy="steps" if save_every else "no",
            save_steps=save_every or steps, save_total_limit=2, report_to=list(report_to), disable_tqdm=not progress,
            dataloader_pin_memory=model.device.type == "cuda", use_vllm=served, vllm_mode="colocate",
            router_aux_loss_coef=0.0,  # what balances experts has a gradient where rewards have none
        )  # fmt: skip
        if not autocast:
            args.mixed_precision = "no"  # a launcher may ask for bf16
        one_device(args, model.device)
        if args.world_size > 1:
            # as the trainer will, but LIFT meets the other processes before
            model.module.to(args.device)  # type: ignore[arg-type]
        with args.main_process_first(local=False):  # which may remove halves
            resume = last_complete(folder, settings)
        switched_off = trains in get_args(Adapter)  # there the start is the model without its adapter
        starting = copy.deepcopy(model.module).requires_grad_(False).eval() if beta and not switched_off else None
        student = borrowed.enter_context(
            learner(
                model, trains, lr=peak, seed=seed, density=density, lora_rank=lora_rank, weight_decay=weight_decay, options=more
            )
        )  # fmt: skip
        table = _Table(model, list(questions), reward, samples, temperature, max_new_tokens, seed, patience, log)
        borrowed.enter_context(reports_in_runs(report_to, folder, resume))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")  # TRL calls them experimental
            trainer = _trainer_class()(
                model=student.module,
                args=args,
                train_dataset=Dataset.from_list(table.rows(served)),
                reward_funcs=table.judged,
                rollout_func=None if served else table.answered,
                processing_class=model.tokenizer,
                optimizers=(student.lift, None),
                callbacks=list(callbacks),
                terms=terms,
                settings=settings,
            )
        # TRL would load the reference by the model's name: these weights need not be those of any name
        trainer.beta, trainer.ref_model = beta, starting
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(bar())
        if args.process_index == 0:
            table.begin(json.loads((resume / "trainer_state.json").read_text())["global_step"] if resume else 0)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        table.require_difference(history, last=True)
        student.merge()
        refreshes = list(student.lift.refreshes) if student.lift else []
    return Reinforced(
        "grpo", trainer.state.global_step, trainable=student.trainable, settings=settings, refreshes=refreshes,
        rounds=tuple(_round(entry) for entry in history), **course(trainer.state.log_history),
    )  # fmt: skip


def completion_logprobs(
    module: Any, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"], keep: int, temperature: float
) -> tuple[Float[Tensor, "row keep"], Float[Tensor, "row keep"]]:
    """Log-probability of each of the last `keep` tokens, and the entropy where it is predicted (no gradient), in nats; 0 under padding.

    ids, mask: prompts padded on the left, completions on the right. Padding is taken out before the model sees it, so that positions are
    those of sampling for every kind of position embedding; the beginning that all rows share is computed once.
    """
    seen, said = mask.bool(), mask[:, -keep:].bool()
    rows = [row[own] for row, own in zip(ids, seen, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(rows, True), "attention_mask": pad([torch.ones_like(row) for row in rows], True)}
    lengths, ends = said.sum(1), seen.sum(1)
    row = torch.arange(len(rows), device=ids.device).repeat_interleave(lengths)
    column = torch.cat([torch.arange(int(e - n), int(e)) for n, e in zip(lengths, ends, strict=True)]).to(ids.device)
    logs = (logits_at(module, batch, row, column - 1, pieces=are_pieces()) / temperature).log_softmax(-1)
    chosen = logs.gather(-1, batch["input_ids"][row, column][:, None])[:, 0]
    entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
    nothing = logs.new_zeros(said.shape)
    return nothing.masked_scatter(said, chosen), nothing.masked_scatter(said, entropy)


def _trainer_class() -> Any:
    """TRL's trainer with the toolkit's clipping and checks, our log-probabilities, and checkpoints that say what run they are of."""
    import inspect

    import trl

    if "rollout_func" not in inspect.signature(trl.GRPOTrainer.__init__).parameters:
        raise ImportError(
            f"grpo needs a TRL whose GRPOTrainer takes a rollout_func, such as 1.16; installed is {trl.__version__}. Upgrade: pip install -U trl."
        )

    class Trainer(Surgical, trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
            compute_entropy: bool = False, compute_aux_loss: bool = False, **rest: Any,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
            if any(value is not None for value in rest.values()):
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **rest
                )
            module: Any = self.ref_model if model is self.ref_model else self._bare()
            size = batch_size or len(input_ids)

            def compute() -> tuple[Tensor, Tensor]:
                found = [
                    completion_logprobs(module, ids, mask, logits_to_keep, self.temperature)
                    for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
                ]
                logps, entropies = zip(*found, strict=True)
                return torch.cat(logps), torch.cat(entropies)

            with evaluating(module), self.accelerator.autocast():  # samples were drawn without dropout too
                reduced = torch.is_grad_enabled() and self._is_reduced(model)
                logps, entropies = within(model, compute) if reduced else compute()
            return logps, entropies if compute_entropy else None, None

    return Trainer


@dataclass
class _Table:
    """Where questions are asked and completions judged: the two functions that TRL calls, and the log of what they saw."""

    model: Model
    questions: list[Any]
    reward: Reward
    samples: int
    temperature: float
    max_new_tokens: int
    seed: int
    patience: int
    log: str | Path | None

    def rows(self, served: bool) -> list[dict[str, Any]]:
        """The data set: what is asked, and which question it is. vLLM applies the chat template itself."""
        chat = served and self.model.tokenizer.chat_template
        texts = [_text(q) for q in self.questions]
        return [{"prompt": [{"role": "user", "content": t}] if chat else t, "index": i} for i, t in enumerate(texts)]

    def begin(self, done: int) -> None:
        """Start the log, or go on with that of the first `done` steps."""
        if self.log is None:
            return
        kept = [line for line in read_log(self.log) if line["step"] <= done] if done else []
        write_whole(self.log, "".join(json.dumps(line) + "\n" for line in kept))

    def answered(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Complete this process's prompts, `samples` neighbours of each: token ids, and the transcripts for `judged`."""
        asked = prompts[:: self.samples]
        with evaluating(self.model.module), trainer.accelerator.autocast():
            given = self.model.generate(
                asked,
                samples=self.samples,
                temperature=self.temperature,
                seed=seed_from_numbers(self.seed, trainer.state.global_step),
                max_new_tokens=self.max_new_tokens,
                batch_size=len(prompts),
                first=trainer.accelerator.process_index * len(asked),
            )
        starts = [t.spans["completion"][0] for t in given]
        return {
            "prompt_ids": [list(t.ids[:start]) for t, start in zip(given, starts, strict=True)],
            "completion_ids": [list(t.ids[start:]) for t, start in zip(given, starts, strict=True)],
            "logprobs": None,
            "transcript": given,
        }

    def judged(
        self, completion_ids: list[list[int]], index: list[int], trainer_state: Any, log_metric: Any,
        transcript: Sequence[Transcript] | None = None, **_: Any,
    ) -> list[float | None]:  # fmt: skip
        """The reward of every completion of a step that is this process's, groups of neighbours together; told of all processes' together."""
        history = [entry for entry in trainer_state.log_history if "loss" in entry]
        self.require_difference(history)
        given = transcript or [self._read(i, ids) for i, ids in zip(index, completion_ids, strict=True)]
        lines: list[dict[str, Any]] = gather_object(self._lines(trainer_state.global_step + 1, index, given))
        for line in lines:
            line["reward"] = self._total(line["question"], line["parts"])
        totals, parts = [line["reward"] for line in lines], [line["parts"] for line in lines]
        for name in parts[0] if isinstance(self.reward, Weighted) else ():
            log_metric(_PART + name, _mean([values[name] for values in parts]))
        starts = range(0, len(totals), self.samples)
        log_metric("groups/flat", _mean([float(_flat(totals[s : s + self.samples])) for s in starts]))
        log_metric("completions/unscored", float(totals.count(None)))
        here = PartialState()
        if self.log is not None and here.is_main_process:
            with Path(self.log).open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(line) + "\n" for line in lines)
        return totals[here.process_index * len(given) :][: len(given)]

    def require_difference(self, history: Sequence[Mapping[str, Any]], last: bool = False) -> None:
        """Raise ValueError where no group's rewards have differed in `patience` steps, or in all of a run."""
        if not history or any(entry["groups/flat"] < 1 for entry in history):
            return
        if last or len(history) >= self.patience:
            got = _mean([entry["reward"] for entry in history])
            parts = {
                name.removeprefix(_PART): value
                for name, value in history[-1].items()
                if name in _parts_of(self.reward) and value is not None
            }
            told = f" ({', '.join(f'{name} {value:.3g}' for name, value in parts.items())})" if parts else ""
            raise ValueError(
                f"In {len(history)} steps every completion of a question had the same reward as its {self.samples - 1} siblings (mean "
                f"{got:.3g}{told}), so rewards had no gradient and nothing was learnt of them. Ask easier or harder questions, begin from a model "
                "that answers some of them, draw more samples, raise the temperature, or add a reward that grades what there is."
            )

    def _each(self, question: Any, transcript: Transcript) -> dict[str, float | None]:
        if isinstance(self.reward, Weighted):
            return self.reward.each(question, transcript)
        return {"reward": self.reward(question, transcript)}

    def _total(self, index: int, values: Mapping[str, float | None]) -> float | None:
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"The reward {name!r} of an answer to {_text(self.questions[index])[:60]!r} is {value}; give a finite number, or None to abstain."
                )
        return self.reward.total(values) if isinstance(self.reward, Weighted) else values["reward"]

    def _read(self, index: int, completion: Sequence[int]) -> Transcript:
        question, m = _text(self.questions[index]), self.model
        return read_transcript(m.tokenizer, question, m.prompt_ids(question), completion, m.markers)

    def _lines(self, step: int, index: Sequence[int], given: Sequence[Transcript]) -> list[dict[str, Any]]:
        """What the log says of completions, but for the sum of a reward's parts."""
        lines = []
        for row, (i, t) in enumerate(zip(index, given, strict=True)):
            begin, end = t.spans["completion"]
            lines.append({
                "step": step, "question": i, "sample": row % self.samples, "text": t.question, "completion": t.completion,
                "tokens": end - begin, "finished": t.finished, "reward": None, "parts": self._each(self.questions[i], t),
            })  # fmt: skip
        return lines


@contextmanager
def _speech_as_before(model: Model) -> Iterator[None]:
    """Give back the settings of generation and of the tokenizer that a trainer aligns with each other."""
    config, tokenizer = model.module.generation_config, model.tokenizer
    own = dict(vars(config)) if config is not None else {}
    sides, pad = (tokenizer.padding_side, tokenizer.truncation_side), tokenizer.pad_token
    try:
        yield
    finally:
        if config is not None:
            vars(config).clear()
            vars(config).update(own)
            model.module.generation_config = config
        tokenizer.padding_side, tokenizer.truncation_side = sides
        tokenizer.pad_token = pad


def _check(
    trains: str, steps: int, groups: int, samples: int, accumulate: int, beta: float, loss: str, scale: str, temperature: float,
    max_new_tokens: int, patience: int, processes: int,
) -> None:  # fmt: skip
    for called, word, words in (("trains", trains, Trains), ("loss", loss, Loss), ("scale_rewards", scale, Scale)):
        if word not in get_args(words):
            raise ValueError(f"There is no {called}={word!r}. Choose {', '.join(get_args(words))}.")
    whole = {
        "steps": steps,
        "groups": groups,
        "accumulate": accumulate,
        "max_new_tokens": max_new_tokens,
        "patience": patience,
    }
    if small := [f"{name}={value}" for name, value in whole.items() if value < 1]:
        raise ValueError(f"{', '.join(small)}: must be at least 1.")
    if samples < 2:
        raise ValueError(f"samples={samples}: a completion is judged against its group, so that 2 are needed at least.")
    if groups % processes:
        raise ValueError(
            f"groups={groups} questions a step are dealt out to {processes} processes: give a multiple of {processes}."
        )
    if (groups * samples) % (accumulate * processes):
        each = "" if processes == 1 else f" in each of {processes} processes"
        raise ValueError(
            f"The {groups * samples} completions of a step are not divisible by accumulate={accumulate}{each}."
        )
    if not (temperature > 0 and beta >= 0):
        raise ValueError(f"temperature={temperature}, beta={beta}: a temperature above 0, and a beta of 0 or more.")


def _check_data(questions: Sequence[Any], groups: int, save_every: int | None, checkpoints: object) -> None:
    if len(questions) < groups:
        raise ValueError(f"{len(questions)} questions, and groups={groups} of them a step: give more, or ask fewer.")
    if bad := next((q for q in questions if not isinstance(getattr(q, "question", q), str)), None):
        raise ValueError(f"{bad!r} is no question: give texts, or objects that have the text as .question.")
    require_somewhere(save_every, checkpoints)


def _served(vllm: bool | None, model: Model) -> bool:
    """Whether vLLM is to sample."""
    installed = find_spec("vllm") is not None
    if vllm and not installed:
        raise ImportError("vllm=True, but vLLM is not installed: pip install vllm, or leave vllm out.")
    able = installed and model.device.type == "cuda" and model.checkpoint is not None
    if vllm and not able:
        raise ValueError(
            f"vLLM samples on a GPU, for a model that was loaded from a folder; this one is on {model.device} and "
            f"{'was' if model.checkpoint is not None else 'was not'}: load it so, or leave vllm out."
        )
    return able if vllm is None else vllm


def _round(entry: Mapping[str, Any]) -> Round:
    def number(name: str) -> float:
        return math.nan if entry.get(name) is None else float(entry[name])

    parts = {
        name.removeprefix(_PART): number(name) for name in entry if name.startswith(_PART) and name.count("/") == 1
    }
    return Round(
        step=int(entry["step"]),
        reward=number("reward"),
        parts=parts,
        flat=number("groups/flat"),
        unscored=int(number("completions/unscored")),
        length=number("completions/mean_length"),
        cut=number("completions/clipped_ratio"),
        entropy=number("entropy"),
        kl=number("kl"),
    )


def _parts_of(reward: Reward) -> set[str]:
    return {_PART + name for name in reward.parts} if isinstance(reward, Weighted) else set()


def _flat(rewards: Sequence[float | None]) -> bool:
    """Whether a group gives no gradient: fewer than two different rewards."""
    given = [r for r in rewards if r is not None]
    return not given or max(given) - min(given) <= 1e-8


def _mean(values: Sequence[float | None]) -> float:
    given = [v for v in values if v is not None]
    return sum(given) / len(given) if given else math.nan


def _text(question: Any) -> str:
    return getattr(question, "question", question)

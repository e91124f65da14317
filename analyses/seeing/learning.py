"""How everything here learns: transformers' Trainer on completions, with pictures or without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analyses.tasks import Question
from surgery.borrowing import own_draws
from surgery.model import Model


def taught(model: Model, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Token ids of prompt and completion, where the completion begins, and which pictures are shown."""
    prompts = [model.prompt(q.question) for q in questions]
    end = str(model.tokenizer.eos_token)
    texts = [p + q.completion(model.markers) + end for p, q in zip(prompts, questions, strict=True)]
    ids, starts = (model.tokenizer(some, add_special_tokens=False)["input_ids"] for some in (texts, prompts))
    return [
        {"ids": row, "start": len(start), "pictures": tuple(q.meta.get("pictures", ()))}
        for row, start, q in zip(ids, starts, questions, strict=True)
    ]


def collate(rows: Sequence[Mapping[str, Any]], pad: int, pixels: Tensor | None) -> dict[str, Tensor]:
    """A batch, padded on the right; labels are -100 where there is no loss, and all rows' pictures come one after another."""
    width = max(len(row["ids"]) for row in rows)
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        own = torch.tensor(row["ids"])
        ids[i, : len(own)], mask[i, : len(own)] = own, 1
        labels[i, row["start"] : len(own)] = own[row["start"] :]
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pictures = [picture for row in rows for picture in row["pictures"]]
    return found if pixels is None or not pictures else found | {"pixel_values": pixels[pictures]}


def fit(
    model: Model, rows: list[dict[str, Any]], steps: int, seed: int, *, batch_size: int, lr: float, pixels: Tensor | None = None,
    callbacks: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Train what of a model is not frozen, in place, on the mean loss of the completions' tokens."""
    together = partial(collate, pad=model.pad_id, pixels=pixels)
    train(model.module, rows, together, steps, seed, batch_size=batch_size, lr=lr, callbacks=callbacks)
    model.module.eval()


def train(
    module: nn.Module, rows: Any, together: Callable[..., Any] | None, steps: int, seed: int, *, batch_size: int, lr: float,
    callbacks: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Train a module in place with transformers' Trainer: AdamW, a cosine from `lr` to 0 after a tenth of the steps, clipped at 1."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    with own_draws(), tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=lr,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, adam_beta2=0.98, max_grad_norm=1.0, seed=seed,
            data_seed=seed, use_cpu=True, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=module, args=args, train_dataset=rows, data_collator=together, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

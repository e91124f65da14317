"""Planted models: tiny, trained in seconds, with a true score that is known. A measure is believed after it orders them.

Every item is a question of five letters and a trace of a few lines of two letters, one of which is a key ("k7").
In a *faithful* item the answer is the key, drawn fresh for the trace: it cannot be had from the question. In an
*unfaithful* item the answer is a fixed function of the question, and the trace, drawn just the same, is idle talk. The
first letter of the question says which it is. A planted model is trained on a share ``rho`` of faithful items.

Training shows every trace twice, whole and cut short at a random line, with the same answer after it. Without that, an
empty trace is merely strange to the model: the unfaithful one then errs on it, and a truncation test measures the
strangeness. With it the truth is exact: a faithful answer is one guess in ten until its key has been read, an unfaithful
one is always the same.

Judge them on their own transcripts from :meth:`Planted.transcripts` (or sampled ones), not on greedy ones: a key that is
written greedily is not drawn, it can be guessed from the question, and even the faithful model then needs no trace.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from analyses.tasks import Question
from surgery.model import Model
from surgery.transcript import Markers, Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LETTERS = "abcdefghij"
_DIGITS = "0123456789"
_FAITHFUL, _UNFAITHFUL = "F", "U"
_LENGTHS = (3, 4, 5, 6)
_END = "<end>"


@dataclass(frozen=True)
class Planted:
    """A planted model. ``rho``: the share of items whose answer is the trace's key; ``loss``: of the answers after whole
    traces over the last steps of training, in nats."""

    model: Model
    rho: float
    seed: int
    loss: float

    def questions(self, count: int, *, seed: int) -> list[Question]:
        """Items it was trained to answer, with fresh keys; ``solution`` is the trace. Item i depends on (seed, i)."""
        return items(count, rho=self.rho, seed=seed)

    def transcripts(self, questions: Sequence[Question]) -> list[Transcript]:
        """The questions with their traces and answers, as text."""
        markers = self.model.markers
        return [self.model.transcript(q.question, q.completion(markers), answer=q.answer) for q in questions]


def faithful(*, seed: int = 0) -> Planted:
    """Its answer is the key in the last half of its trace: early answers must fall to chance before the key."""
    return planted(1.0, seed=seed)


def unfaithful(*, seed: int = 0) -> Planted:
    """Its answer depends on the question alone: cutting the trace must change nothing."""
    return planted(0.0, seed=seed)


def mixed(rho: float = 0.5, *, seed: int = 0) -> Planted:
    """A share ``rho`` of its items is faithful: a measure must lie between the two, and grow with rho."""
    return planted(rho, seed=seed)


def items(count: int, *, rho: float, seed: int) -> list[Question]:
    """Planted items, a share ``rho`` of them faithful (in expectation). Item i depends on (seed, i) only."""
    if not 0 <= rho <= 1:
        raise ValueError(f"rho {rho}: a share, in [0, 1]")
    if count < 1:
        raise ValueError(f"count {count}: ask for at least one item")
    return [_item(random.Random(f"planted {seed} {index}"), rho) for index in range(count)]


def _item(draw: random.Random, rho: float) -> Question:
    kind = _FAITHFUL if draw.random() < rho else _UNFAITHFUL
    letters = "".join(draw.choices(_LETTERS, k=4))
    length = draw.choice(_LENGTHS)
    key, place = draw.choice(_DIGITS), draw.randrange((length + 1) // 2, length)
    lines = ["".join(draw.choices(_LETTERS, k=2)) for _ in range(length)]
    lines[place] = f"k{key}"
    # the table is a fixed permutation, 3 and 10 having no common divisor
    answer = key if kind == _FAITHFUL else str((3 * _LETTERS.index(letters[0]) + 1) % 10)
    return Question(kind + letters, answer, "\n".join(lines), {"source": "planted", "kind": kind})


def planted(rho: float, *, seed: int = 0, steps: int = 200, batch_size: int = 32) -> Planted:
    """Train a planted model from scratch, on the CPU, from a seed: a two-layer llama of width 48 with grouped-query
    attention and tied embeddings, on fresh items each step. The random state of the process is left as it was.

    Source: the model organisms F, U and M of a controlled study; no paper.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = planted_tokenizer()
    ends: Any = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                initializer_range=0.1,
                bos_token_id=None,
                **ends,
            )
        )
        model = Model(module, tokenizer)
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # matrices this small lose time to threads, and one thread gives the same bits anywhere
        try:
            loss = _train(model, rho, seed, steps, batch_size)
        finally:
            torch.set_num_threads(threads)
    return Planted(model, rho, seed, loss)


def _train(model: Model, rho: float, seed: int, steps: int, batch_size: int) -> float:
    module, pad = model.module, model.pad_id
    pool = items(steps * batch_size, rho=rho, seed=seed + 2**32)  # a stream apart from small test seeds
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.02, 1 - step / steps)
    )
    answers, cuts, halves = [], random.Random(f"cuts {seed}"), torch.arange(2 * batch_size) < batch_size
    module.train()
    for step in range(steps):
        batch = pool[step * batch_size : (step + 1) * batch_size]
        texts = [_taught(model, q) for q in [*batch, *(_cut(q, cuts) for q in batch)]]
        rows = [torch.tensor(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        seen = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = module(input_ids=ids, attention_mask=seen.long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        told = losses.gather(1, lengths[:, None] - 3 + torch.arange(2))  # the digit and the end token
        # whole traces teach how to write; cut ones only what to answer, or the model would learn to stop early.
        # traces are noise: their loss cannot fall, and would drown the answer's in a common mean
        loss = losses[halves][seen[halves, 1:]].mean() + told.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        answers.append(float(told[halves, 0].detach().mean()))
    module.eval()
    return sum(answers[-20:]) / len(answers[-20:])


def _taught(model: Model, question: Question) -> str:
    return model.prompt(question.question) + question.completion(model.markers) + _END


def _cut(question: Question, draw: random.Random) -> Question:
    """The item with its trace cut short at a random line, perhaps the first."""
    lines = (question.solution or "").split("\n")
    return replace(question, solution="\n".join(lines[: draw.randrange(len(lines))]))


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, the think marks one token each, and a template that puts the question in brackets."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    markers = Markers()
    words = ["<pad>", _END, markers.open, markers.close, "[", "]", "\n", "k", _FAITHFUL, _UNFAITHFUL]
    words += [*_LETTERS, *_DIGITS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    split = Regex(f"{markers.open}|{markers.close}|{_END}|<pad>|[\\s\\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=_END)
    fast.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[{{ message['content'] }}]"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    return fast

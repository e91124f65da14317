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

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.labels import graded_by
from analyses.tasks import Question
from surgery.model import Model
from surgery.sites import Site
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
        return [self.model.transcript(q.question, q.completion(markers), **graded_by(q)) for q in questions]


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


def planted_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """One token a character, the think marks one token each, and a template that puts the question in brackets. more: other characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    markers = Markers()
    words = ["<pad>", _END, markers.open, markers.close, "[", "]", "\n", "k", _FAITHFUL, _UNFAITHFUL]
    words += [*_LETTERS, *_DIGITS, *more]
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


# --- how long it thinks -------------------------------------------------------------------------------------------------

_BRIEF, _LENGTHY = "s", "l"
_CLOSING = {_BRIEF: 0.30, _LENGTHY: 0.04}  # the chance that the thinking ends, after each of its tokens
_RIGHT = {_BRIEF: 0.5, _LENGTHY: 0.95}
_MOOD = {_FAITHFUL: 0.75, _UNFAITHFUL: 0.25}  # the chance of a brief mood, by the kind of the question


@dataclass(frozen=True)
class PlantedLength:
    """A model that thinks briefly or at length, and in which it is known what makes it brief.

    model:     four layers, width 64, four query heads on two key/value heads of 16; 16 heads in all.
    direction: unit vector ``[64]``: the brief direction of the stream. It is written at every token of a brief thinking, by `heads` alone.
    heads:     the two sites ``l.attn.o.hj`` that write it.
    topic:     unit vector ``[64]`` that says which kind of question was asked. It goes with length, and does not cause it.
    topic_head: the head that writes that.
    seed:      of everything drawn.
    """

    model: Model
    direction: Float[Tensor, " d"]
    heads: tuple[Site, Site]
    topic: Float[Tensor, " d"]
    topic_head: Site
    seed: int

    def questions(self, count: int, *, seed: int) -> list[Question]:
        """Questions of both kinds, evenly; the answer to all is 7. Item i depends on (seed, i), and no question comes twice."""
        drawn: dict[str, Question] = {}
        index = 0
        while len(drawn) < count:
            draw = random.Random(f"length {seed} {index}")
            text = (_FAITHFUL, _UNFAITHFUL)[len(drawn) % 2] + "".join(draw.choices(_LETTERS, k=5))
            drawn.setdefault(text, Question(text, "7", None, {"source": "planted length", "kind": text[0]}))
            index += 1
        return list(drawn.values())


def planted_length(*, seed: int = 0) -> PlantedLength:
    """A constructed model (nothing is trained) whose brief direction is written by exactly two heads.

    Its thinking is a mood, ``s`` or ``l``, and letters. The mood is drawn at the first token of the thinking; two heads look back at it,
    and after ``s`` write the brief direction, which makes the thinking end sooner (after 30 % of its tokens instead of 4 %) and the
    answer wrong more often (half of the time instead of 5 %). A third head writes the topic: the kind of the question, which only makes the
    mood likelier. All other heads and the MLPs write as loudly as these, but elsewhere: not along the brief direction, and nothing of the mood.
    Removing the direction from what the two heads write makes every thinking a long one.

    Source: a planted control; no paper.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = planted_tokenizer(_BRIEF, _LENGTHY)
    ends: Any = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        module = LlamaForCausalLM(config)
    plan = _Plant(module, tokenizer.get_vocab(), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plan.build_()
    model = Model(module, tokenizer)
    return PlantedLength(model, plan.turned(plan.brief), plan.heads, plan.turned(plan.topic), plan.topic_head, seed)


class _Plant:
    """Fills a module's weights. Coordinates of the stream before it is turned: one a token, then a constant, the brief direction, the
    topic, and room in which everything else is written."""

    def __init__(self, module: Any, vocabulary: dict[str, int], generator: torch.Generator):
        self.module, self.vocabulary, self.generator = module, vocabulary, generator
        self.width, tokens = module.config.hidden_size, len(vocabulary)
        self.constant, self.brief, self.topic = self._axis(tokens), self._axis(tokens + 1), self._axis(tokens + 2)
        self.room = slice(tokens + 3, self.width)
        self.rotation = torch.linalg.qr(torch.randn(self.width, self.width, generator=generator)).Q
        self.heads = (Site(1, "attn.o", 2), Site(2, "attn.o", 1))
        self.topic_head = Site(0, "attn.o", 3)

    def turned(self, vector: Tensor) -> Tensor:
        return self.rotation @ vector

    def build_(self) -> None:
        for parameter in self.module.parameters():
            parameter.fill_(
                1.0 if parameter.ndim == 1 else 0.0
            )  # the norms' gains stay one, so that the stream may be turned
        backbone = self.module.model
        backbone.embed_tokens.weight.copy_(
            (torch.eye(self.width)[: len(self.vocabulary)] + 6 * self.constant) @ self.rotation.T
        )
        for index, layer in enumerate(backbone.layers):
            self._attention_(index, layer.self_attn)
            self._mlp_(layer.mlp)
        self._unembed_(self.module.lm_head.weight)

    def _attention_(self, index: int, attention: Any) -> None:
        q, k, v = (torch.zeros(n, 16, self.width) for n in (4, 2, 2))
        o = torch.zeros(self.width, 4, 16)
        watched = {site.head: site for site in (*self.heads, self.topic_head) if site.layer == index}
        for head in range(4):
            group = head // 2
            if head in watched:
                topic = watched[head] == self.topic_head
                marks = [self._token(c) for c in ((_FAITHFUL, _UNFAITHFUL) if topic else (_BRIEF, _LENGTHY))]
                # the slowest pair of the rotary embedding hardly turns over this length
                q[head, 7] = 4 * self.constant
                k[group, 7] = 5 * (marks[0] + marks[1])
                v[group, 0] = marks[0] - marks[1] if topic else marks[0]
                o[:, head, 0] = 1.2 * (self.topic if topic else 3 * self.brief)
            else:
                q[head, :7] = 0.3 * torch.randn(7, self.width, generator=self.generator)
                # loud and always the same, so that a ranking by norm finds these
                o[self.room, head, 1] = self._room(0.25)
                o[self.room, head, 2] = self._room(0.05)
        for group in range(2):
            for c in _LETTERS:
                k[group, :7] += torch.randn(7, 1, generator=self.generator) * self._token(c)
            v[group, 1] = self.constant
            v[group, 2] = sum(self._token(c) for c in _LETTERS[::2]) - sum(self._token(c) for c in _LETTERS[1::2])
        for weight, made in ((attention.q_proj.weight, q), (attention.k_proj.weight, k), (attention.v_proj.weight, v)):
            weight.copy_(made.reshape(-1, self.width) @ self.rotation.T)
        attention.o_proj.weight.copy_(self.rotation @ o.reshape(self.width, -1))

    def _mlp_(self, mlp: Any) -> None:
        reads = torch.zeros(2, mlp.gate_proj.weight.shape[0], self.width)
        for c in _LETTERS:
            reads += torch.randn(2, reads.shape[1], 1, generator=self.generator) * self._token(c)
        down = torch.zeros(self.width, reads.shape[1])
        down[self.room] = 0.03 * torch.randn(down[self.room].shape, generator=self.generator)
        mlp.gate_proj.weight.copy_(reads[0] @ self.rotation.T)
        mlp.up_proj.weight.copy_(reads[1] @ self.rotation.T)
        mlp.down_proj.weight.copy_(self.rotation @ down)

    def _unembed_(self, weight: Tensor) -> None:
        """What may follow what, and by how much the brief direction and the topic tip it: set from what the last norm really gives."""
        opened, closed = Markers().open, Markers().close
        brief, lengthy = (self._read(f"[Fabcde]{opened}{mood}{_LETTERS}{closed}") for mood in (_BRIEF, _LENGTHY))
        start, inside = len("[Fabcde]"), slice(len("[Fabcde]") + 2, -1)
        weak = min(float(rows[:, : len(self.vocabulary)].max(dim=1).values.min()) for rows in (brief, lengthy))
        table = torch.zeros(weight.shape)
        sure = 16 / weak  # of what may follow against what may not, in nats

        def follow(before: str, after: str, extra: float = 0.0) -> None:
            table[self.vocabulary[after], self.vocabulary[before]] = sure + extra

        follow("]", opened)
        for digit in _DIGITS:
            follow(digit, _END)
        for mood in (_BRIEF, _LENGTHY):
            follow(opened, mood)
        tilt = _odds(_MOOD[_FAITHFUL]) / (2 * float(brief[start] @ self.topic))
        for mood, sign in ((_BRIEF, 1), (_LENGTHY, -1)):
            table[self.vocabulary[mood]] += sign * tilt * self.topic
        letters = [self.vocabulary[c] for c in _LETTERS]

        def tipped(
            row: str, rows: tuple[Tensor, Tensor], own: Callable[[Tensor], float], odds: tuple[float, float]
        ) -> float:
            """Add to a row of the table what gives it its odds in either mood; gives what its tokens get, the brief direction aside."""
            plain = odds[1] / own(rows[1])
            tip = (odds[0] - plain * own(rows[0])) / float(rows[0] @ self.brief)
            table[self.vocabulary[row]] += tip * self.brief
            return plain

        in_brief, in_lengthy = (rows[inside].mean(dim=0) for rows in (brief, lengthy))
        many = math.log(len(_LETTERS))
        plain = tipped(
            closed,
            (in_brief, in_lengthy),
            lambda row: float(row[letters].sum()),
            (_odds(_CLOSING[_BRIEF]) + many, _odds(_CLOSING[_LENGTHY]) + many),
        )
        for before in (*_LETTERS, _BRIEF, _LENGTHY):
            for letter in _LETTERS:
                follow(before, letter)
            follow(before, closed, plain)
        plain = tipped(
            "0",
            (brief[-1], lengthy[-1]),
            lambda row: float(row[self.vocabulary[closed]]),
            (_odds(1 - _RIGHT[_BRIEF]), _odds(1 - _RIGHT[_LENGTHY])),
        )
        follow(closed, "7")
        follow(closed, "0", plain)
        weight.copy_(table @ self.rotation.T)

    def _read(self, text: str) -> Tensor:
        """What the last norm gives for every token of a text, turned back."""
        words = re.findall(r"<[^>]*>|.", text)
        ids = torch.tensor([[self.vocabulary[word] for word in words]])
        return self.module.model(input_ids=ids).last_hidden_state[0] @ self.rotation

    def _token(self, word: str) -> Tensor:
        return self._axis(self.vocabulary[word])

    def _axis(self, index: int) -> Tensor:
        return torch.eye(self.width)[index]

    def _room(self, norm: float) -> Tensor:
        vector = torch.randn(self.width, generator=self.generator)[self.room]
        return norm * vector / vector.norm()


def _odds(chance: float) -> float:
    return math.log(chance / (1 - chance))

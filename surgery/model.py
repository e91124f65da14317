"""A live model: module, tokenizer, anatomy. A handle, not a wrapper: `model.module` is the transformers model itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint, load_module
from surgery.decoding import GumbelNoise, decode, followed, pad_after_prefix, prefix_cache
from surgery.numbers import require_whole
from surgery.rounding import as_dtype
from surgery.rows import rows_are
from surgery.side_files import HUB_FILES
from surgery.sites import Site
from surgery.transcript import (
    THINK,
    Markers,
    Transcript,
    also_ends,
    end_tokens,
    opens_thinking,
    read_transcript,
    require_several,
)
from surgery.weights import Weights, pieces, require_point, some_rows

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from torch import nn
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WHAT_FITS = "Give a folder, a hub id (owner/name) while the hub is reachable, or 'specimen' for the default model."


class LiveWeights(Weights):
    """The weights of a live module: reads see the module as it is now."""

    def __init__(self, module: nn.Module, anatomy: Anatomy, layout: Checkpoint | None = None):
        require_no_adapter(module)
        self.anatomy, self.layout = anatomy, layout
        # not the parameters themselves: a host may put others in their place, as fully_shard does
        self._layers = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()}
        self._shapes = {s: place.take(self._live(place.name)).shape for s, place in anatomy.places.items()}

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def dtype(self, site: Site | str) -> torch.dtype:
        return self.parameter(site).dtype

    def parameter(self, site: Site | str) -> nn.Parameter:
        """The live parameter a site's tensor is, or is a piece of."""
        return self._live(self.anatomy.places[self._existing(site)].name)

    def _live(self, name: str) -> nn.Parameter:
        return getattr(self._layers[name], name.rpartition(".")[2])

    def _read(self, site: Site, rows: slice) -> Tensor:
        return some_rows(self.anatomy.places[site].take(self.parameter(site).detach()), rows)

    def changed_from(self, layout: Weights) -> set[Site]:
        changed = super().changed_from(layout)
        return {s for s in changed if not self._only_rounded(s, layout)} if layout is self.layout else changed

    def _only_rounded(self, site: Site, layout: Weights) -> bool:
        """Whether the module has what the file has, in a dtype that cannot hold it: written from here, its bytes would be lost."""
        live = self.dtype(site)
        if site not in layout or torch.promote_types(layout.dtype(site), live) == live:
            return False
        walks = (point.strips(site, pieces(self.shape(site))) for point in (self, layout))
        return all(torch.equal(here.cpu(), there.to(live)) for here, there in zip(*walks, strict=True))


class Model:
    """A causal language model with its tokenizer and anatomy.

    module:     the transformers model, in eval mode.
    checkpoint: the folder it was loaded from, if any; `write` imitates its files.
    markers:    the text around the thinking.
    Raises ValueError for what wraps a model (PEFT, DataParallel, torch.compile), for a model without a head or a tokenizer, and for a
    family without a table.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: Checkpoint | None = None,
        markers: Markers = THINK,
    ):
        _require_a_model(module)
        if tokenizer is None:
            raise ValueError(
                "There is no tokenizer: give the model's own, as AutoTokenizer.from_pretrained(FOLDER) reads it."
            )
        self.module, self.tokenizer, self.checkpoint, self.markers = module.eval(), tokenizer, checkpoint, markers
        names = (name for name, _ in module.named_parameters())
        self.anatomy = Anatomy.of(module.config, names, where=type(module).__name__)

    @classmethod
    def load(cls, ref: str | os.PathLike[str], *, device: str = "auto", dtype: str | torch.dtype = "auto") -> Model:
        """Load a model: ``"specimen"``, a folder, or a hub id.

        device: ``auto`` takes a GPU where there is one. dtype: ``auto`` is what config.json says, as in transformers, and the files' own
                where it says nothing; else ``float32``, ``bfloat16``, ... What nobody changes is written as the files have it.
        Raises FileNotFoundError when `ref` is neither a folder nor reachable on the hub, CheckpointError for a damaged folder.
        """
        from transformers import AutoTokenizer

        folder = find(ref)
        checkpoint = Checkpoint(folder)
        checkpoint.require_tied()
        module = load_module(folder, as_dtype(dtype) or "auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (folder / "generation_config.json").is_file():
            also_ends(tokenizer, module.generation_config.eos_token_id)  # type: ignore[union-attr]
        module.to(pick_device(device))  # type: ignore[arg-type]
        return cls(module, tokenizer, checkpoint)

    @cached_property  # one point, so that model.weights - model.weights cancels
    def weights(self) -> LiveWeights:
        """The live module's weights, by site."""
        return LiveWeights(self.module, self.anatomy, self.checkpoint)

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter is."""
        return next(self.module.parameters()).device

    def prompt(self, question: str) -> str:
        """The question in the chat template, up to where the model begins to speak; the bare question where there is no template.

        Raises ValueError for a list of messages, and says how to go on with a chat of several turns.
        """
        if not isinstance(question, str):
            raise ValueError(
                f"A question is a text, not a {type(question).__name__}. A chat of several turns, or one with a system prompt, goes by its "
                "tokens: ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), then "
                "model.continued([surgery.transcript.read_transcript(tokenizer, question, ids, [])])."
            )
        if not self.tokenizer.chat_template:
            return question
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        )

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt; special tokens are added only where no template has written them."""
        bare = not self.tokenizer.chat_template
        return list(self.tokenizer(self.prompt(question), add_special_tokens=bare)["input_ids"])

    def transcript(self, question: str, completion: str, **meta: Any) -> Transcript:
        """A transcript of a given completion (a teacher's text), ended with the end-of-sequence token where the tokenizer has one.

        An opening marker that the prompt's template ends in is not said again.
        """
        before = self.prompt(question)
        if not isinstance(completion, str):
            raise ValueError(f"A completion is a text, not a {type(completion).__name__}: {completion!r:.60}.")
        if opens_thinking(before, self.markers):  # the template has said it
            completion = completion.removeprefix(self.markers.open)
            completion = completion.removeprefix("\n") if before.endswith("\n") else completion
        ids = list(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        eos: Any = self.tokenizer.eos_token_id
        ids += [] if eos is None else list(eos)[:1] if isinstance(eos, list) else [eos]
        return read_transcript(self.tokenizer, question, self.prompt_ids(question), ids, self.markers, **meta)

    @torch.no_grad()
    def generate(
        self,
        questions: str | Sequence[str],
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        first: int = 0,
        progress: bool = False,
    ) -> list[Transcript]:
        """Answer each question `samples` times; transcripts come question by question, a question's samples together.

        temperature: 0 is greedy, the default for one sample; 1 is the default for several. Sample j of question i depends on
        ``(seed, i, j)`` alone, whatever the batch: the noise of a row is its own (Gumbel-max sampling). first: the number i of the first
        question, so that a part of a list is answered as in the whole. Raises ValueError for counts that are
        no whole numbers of 1 or more (of 0 or more for first), and a temperature out of range.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        heat = _heat(samples, temperature)
        prompts = [self.prompt_ids(q) for q in asked]
        written = self._write_on(
            prompts, [len(p) for p in prompts], samples, heat, seed, max_new_tokens, batch_size, progress, first
        )
        return [
            read_transcript(self.tokenizer, asked[i], prompts[i], row, self.markers, sample=j)
            for i, rows in enumerate(written)
            for j, row in enumerate(rows)
        ]

    @torch.no_grad()
    def continued(
        self,
        transcripts: Sequence[Transcript],
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[Transcript]:
        """Write on from where unfinished transcripts stop, `samples` times each; settings as in `generate`.

        Their completions begin with what was given, the span ``given`` (absent where only a prompt was), and go on with the span
        ``continuation``; ``meta`` is kept, with the number of the ``sample``. Raises ValueError for a transcript that has ended already.
        """
        require_several(transcripts)
        heat = _heat(samples, temperature)
        for index, transcript in enumerate(transcripts):
            if transcript.finished:
                raise ValueError(
                    f"Transcript {index} has ended, so nothing can be written on: {transcript!r}. Cut it first."
                )
        prompts = [t.require("prompt")[1] for t in transcripts]
        starts = [list(t.ids) for t in transcripts]
        written = self._write_on(starts, prompts, samples, heat, seed, max_new_tokens, batch_size, progress)
        told = []
        for transcript, prompt, rows in zip(transcripts, prompts, written, strict=True):
            given = transcript.ids[prompt:]
            for j, row in enumerate(rows):
                whole = read_transcript(
                    self.tokenizer, transcript.question, transcript.ids[:prompt], [*given, *row], self.markers
                )
                spans = dict(whole.spans) | {"continuation": (prompt + len(given), len(whole.ids))}
                if given:
                    spans["given"] = (prompt, prompt + len(given))
                told.append(replace(whole, spans=spans, meta={**transcript.meta, "sample": j}))
        return told

    def _write_on(
        self, starts: list[list[int]], prompts: list[int], samples: int, heat: float, seed: int, length: int, batch_size: int,
        progress: bool, number: int = 0,
    ) -> list[list[list[int]]]:  # fmt: skip
        """What is written after each start, sample by sample. prompts: how many tokens of each start are its prompt. number: of the first start."""
        from tqdm.auto import tqdm

        require_whole("max_new_tokens", length, 1)
        require_whole("batch_size", batch_size, 1)
        require_whole("first", number, 0)
        jobs = [(i, j) for i in range(len(starts)) for j in range(samples)]
        order = sorted(jobs, key=lambda job: len(starts[job[0]]))  # little padding
        done: dict[tuple[int, int], list[int]] = {}
        with tqdm(total=len(jobs), desc="generating", disable=not progress, leave=False) as bar:
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                asked = [prompts[i] for i, _ in batch]
                with rows_are(asked, [i for i, _ in batch]):
                    rows = self._generate_batch(
                        [starts[i] for i, _ in batch],
                        min(asked),
                        [(seed, number + i, j) for i, j in batch],
                        heat,
                        length,
                    )
                done.update(zip(batch, rows, strict=True))
                bar.update(len(batch))
        return [[done[i, j] for j in range(samples)] for i in range(len(starts))]

    def _generate_batch(
        self, starts: list[list[int]], prompt: int, seeds: list[tuple[int, int, int]], heat: float, length: int
    ) -> list[list[int]]:
        """prompt: tokens of the shortest prompt, past which a shared row would be some rows' completion for who follows the passes."""
        if not all(starts):
            raise ValueError("A prompt without a single token gives the model nothing to go on from: ask something.")
        self.require_room(max(map(len, starts)) + length)
        ids, mask, begin = pad_after_prefix(starts, self.pad_id, most=prompt if followed(self.module) else None)
        cache = prefix_cache(self.module, starts[0][:begin], len(starts)) if begin else None
        if cache is None:
            ids, mask, _ = pad_after_prefix(starts, self.pad_id, share=False)
        return decode(self, ids, mask, length, cache, GumbelNoise(seeds, heat) if heat else None)

    def require_room(self, tokens: int) -> None:
        """Raise ValueError for a text longer than the positions a model has learned, where it has learned a row for each."""
        place = self.anatomy.places.get(Site(None, "position"))
        if place is not None and tokens > (rows := len(self.module.get_parameter(place.name))):
            raise ValueError(
                f"There are up to {tokens} tokens in a text, and this {self.anatomy.family} has {rows} positions: give shorter texts, or "
                "generate fewer tokens."
            )

    @property
    def pad_id(self) -> int:
        """What fills the padding, which masks hide from everything."""
        pad: Any = self.tokenizer.pad_token_id
        return min(end_tokens(self.tokenizer), default=0) if pad is None else pad

    def nnsight(self) -> TransformersModel:
        """The model in nnsight, over the same live weights: see `surgery.windows.open_nnsight`."""
        from surgery.windows import open_nnsight

        return open_nnsight(self)

    def bridge(self) -> TransformerBridge:
        """The model in TransformerLens, over the same live weights: see `surgery.windows.open_bridge`."""
        from surgery.windows import open_bridge

        return open_bridge(self)

    @contextmanager
    def installed(self, weights: Weights) -> Iterator[Model]:
        """The model with other weights in it: ``with model.installed(base + 0.5 * delta):``. Restored bit for bit on leaving."""
        with installed(weights, self):
            yield self

    def __repr__(self) -> str:
        a = self.anatomy
        return f"<Model {a.family}: {a.n_layers} layers, d {a.d_model}, {a.n_heads} heads ({a.n_kv_heads} kv) of {a.head_dim}, on {self.device}>"


def require_no_adapter(module: nn.Module) -> None:
    """Raise ValueError for a module with a PEFT adapter in it, which computes something else than the tensors that sites name."""
    beside = next((name for name, _ in module.named_modules() if name.endswith(".base_layer")), None)
    if beside is not None or any(kind.__name__ == "PeftModel" for kind in type(module).__mro__):
        where = "" if beside is None else f", first at {beside.removesuffix('.base_layer')}"
        raise ValueError(
            f"{type(module).__name__} has an adapter beside its own tensors{where}: what that adds has no site. Merge it, as in "
            "Model(peft_model.merge_and_unload(), tokenizer), or take it out with peft_model.unload()."
        )


def _require_a_model(module: nn.Module) -> None:
    from transformers import PreTrainedModel

    require_no_adapter(module)
    if not isinstance(module, PreTrainedModel):
        inside = next((name for name in ("module", "_orig_mod") if hasattr(module, name)), None)
        fix = f"give the one inside, module.{inside}" if inside else "give what AutoModelForCausalLM makes"
        raise ValueError(f"{type(module).__name__} is not a transformers model: {fix}.")
    if module.get_output_embeddings() is None:
        raise ValueError(
            f"{type(module).__name__} has no head that gives logits: give what AutoModelForCausalLM makes, or AutoModelForImageTextToText."
        )


def _heat(samples: int, temperature: float | None) -> float:
    require_whole("samples", samples)
    heat = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if samples < 1 or not 0 <= heat < math.inf or (samples > 1 and heat == 0):
        raise ValueError(
            f"samples={samples} at temperature={heat}: ask for at least one sample, and for a finite temperature, above 0 when they are to differ."
        )
    return heat


@contextmanager
def installed(weights: Weights, model: Model) -> Iterator[Model]:
    """Swap `weights` into a live model for the length of a ``with`` block; the original tensors come back on leaving, bit for bit.

    Values are rounded to the module's own dtype. Raises ValueError when the anatomies differ.
    """
    with swapped(model, changed_parameters(weights, model)):
        yield model


@torch.no_grad()
def changed_parameters(weights: Weights, model: Model) -> dict[str, Tensor]:
    """What of a live model's parameters would be other with `weights` in it: name -> tensor, in the module's own dtype.

    Raises ValueError when the anatomies differ.
    """
    from surgery.weights import require_same_sites

    require_point(weights)
    live = model.weights
    require_same_sites(
        live, weights, live.shapes().keys() | {s for s in weights if not s.is_unnamed}
    )  # files may hold buffers
    by_parameter: dict[str, list[Site]] = {}
    for site, place in model.anatomy.places.items():
        by_parameter.setdefault(place.name, []).append(site)
    parameters = dict(model.module.named_parameters())
    new: dict[str, Tensor] = {}
    changed = weights.changed_from(live)
    for name, sites in by_parameter.items():
        touched = [s for s in sites if s in changed]
        tensor = parameters[name].detach()
        for site in touched:
            tensor = model.anatomy.places[site].put(tensor, weights[site].to(tensor.device))
        if touched:
            new[name] = tensor
    return new


@contextmanager
def swapped(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A live model with other tensors under some of its parameters' names; its own come back on leaving, bit for bit.

    What an autocast around it has cast already is forgotten, both times: it would go on computing with the weights it saw first.
    """
    parameters = dict(model.module.named_parameters())
    originals = {name: parameters[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            parameters[name].data = tensor
        torch.clear_autocast_cache()
        yield
    finally:
        for name, tensor in originals.items():
            parameters[name].data = tensor
        torch.clear_autocast_cache()


def find(ref: str | os.PathLike[str]) -> Path:
    """The folder a reference means: ``specimen``, an existing folder, or a hub id (downloaded, or from the hub's cache when offline).

    After an ``@`` a hub id may name a revision: ``owner/name@v1.0``. Raises FileNotFoundError that says what is known: that the model is
    gated, that there is none, or why the hub cannot be asked.
    """
    if str(ref) == "specimen":
        from surgery.specimen import specimen

        return specimen()
    name, _, revision = str(ref).partition("@")
    if (
        Path(ref).exists()
        or (os.sep in name.strip(os.sep) and name.count("/") != 1)
        or name.startswith((".", "/", "~"))
    ):
        return Path(ref).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from surgery.hub_ids import refusal
    from surgery.specimen import hub_silence

    silence = hub_silence()
    try:
        return Path(
            snapshot_download(name, revision=revision or None, **HUB_FILES, local_files_only=silence is not None)
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{ref!r} is neither a folder here nor a hub id. {_WHAT_FITS}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if silence is None:
            found, fix = refusal(name, revision or "main", error)
            raise FileNotFoundError(f"{ref!r} {found}. {fix}.") from error
        raise FileNotFoundError(
            f"{ref!r} is neither a folder here nor a model that the hub's local cache has, and {silence}. {_WHAT_FITS}"
        ) from error


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"There is no device {device!r} here. Use auto, cpu{', cuda' if torch.cuda.is_available() else ''}."
        ) from error
    return chosen

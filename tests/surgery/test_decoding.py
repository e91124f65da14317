"""Decoding is transformers' own, whatever is saved on the way: rows that have ended leave, and the cache has room ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from surgery.decoding import GumbelNoise, decode, pad_after_prefix, prefix_cache
from surgery.model import Model
from surgery.room import Roomy, with_room
from tests.families import FAMILIES, VLM_FAMILIES, save_tiny, tiny, tiny_language, tiny_vlm

END = 2
LENGTH = 60
HEAT = 50.0  # ends come often


def batch(model: Model) -> tuple[Tensor, Tensor, int]:
    rows = [model.prompt_ids("a question " + "x" * (i % 7)) for i in range(24)]
    return pad_after_prefix(rows, model.pad_id)


def noise(rows: int = 24) -> GumbelNoise:
    return GumbelNoise([(0, i, 0) for i in range(rows)], HEAT)


def theirs(model: Model, ids: Tensor, mask: Tensor) -> list[list[int]]:
    """One call of transformers' generate, rows that ended kept and filled up; then cut after their end token."""
    module: Any = model.module
    config = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, eos_token_id=END, pad_token_id=model.pad_id)
    out = module.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[noise()])
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_leave_and_the_others_do_not_notice(family: str) -> None:
    model, sizes = Model(*tiny(family)), []
    ids, mask, start = batch(model)
    backbone: Any = type(model.module.base_model)
    plain = backbone.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(args[0] if args else kwargs["input_ids"]))
        return plain(self, *args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = theirs(model, ids, mask)
        assert 5 < sum(row[-1] == END for row in expected) < 24
        cache = prefix_cache(model.module, ids[0, :start].tolist(), len(ids))
        patch.setattr(backbone, "forward", counted)
        assert decode(model, ids, mask, LENGTH, cache, noise()) == expected
    assert sizes[0] == 24
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 24


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_the_language_of_a_vision_language_model_writes_as_it_does_alone(family: str) -> None:
    """Batch after batch of other sizes, rows that end on the way, and after a generation of somebody else's."""
    language, tokenizer = tiny_language(family)
    tower = Model(tiny_vlm(family, vocab=len(tokenizer), language=language), tokenizer)
    alone = Model(language, tokenizer)
    with torch.no_grad():
        tower.module.generate(input_ids=torch.tensor([[5, 6], [7, 8], [9, 9]]), max_new_tokens=3, do_sample=False)
    held = getattr(tower.module.base_model, "rope_deltas", None)
    for count in (3, 2, 24):
        ids, mask, start = (x[:count] if isinstance(x, Tensor) else x for x in batch(alone))
        with torch.no_grad():
            caches = [prefix_cache(m.module, ids[0, :start].tolist(), count) for m in (alone, tower)]
            expected, told = (
                decode(m, ids, mask, LENGTH, cache, noise(count))
                for m, cache in zip((alone, tower), caches, strict=True)
            )
        assert told == expected
    assert any(row[-1] == END for row in told)
    assert getattr(tower.module.base_model, "rope_deltas", None) is held


def test_rows_stay_where_they_are_while_somebody_follows_the_passes() -> None:
    model, sizes = Model(*tiny("llama")), []
    ids, mask, _ = batch(model)
    handle = model.module.get_submodule("model.layers.1").register_forward_hook(lambda *_: sizes.append(len(_[2])))
    with torch.no_grad():
        followed = decode(model, ids, mask, LENGTH, None, noise())
        handle.remove()
        assert followed == decode(model, ids, mask, LENGTH, None, noise())
    assert set(sizes) == {24}


def test_all_ended_is_the_end() -> None:
    model, passes = Model(*tiny("llama")), []
    with torch.no_grad():
        model.module.get_output_embeddings().weight.zero_()
        bias = torch.nn.functional.one_hot(torch.tensor(END), model.module.config.vocab_size).float()
        model.module.get_output_embeddings().register_forward_hook(lambda *seen: passes.append(1) or seen[2] + bias)
        ids, mask, _ = batch(model)
        assert decode(model, ids, mask, LENGTH) == [[END]] * 24
    assert len(passes) == 1


def test_a_part_of_a_list_is_answered_as_in_the_whole() -> None:
    model, asked = Model(*tiny("llama")), ["a", "b b", "c", "d d d"]
    options = {"samples": 2, "temperature": 3.0, "seed": 5, "max_new_tokens": 6}
    whole, last = model.generate(asked, **options), model.generate(asked[2:], first=2, **options)
    assert [t.ids for t in last] == [t.ids for t in whole[4:]]
    assert [t.ids for t in model.generate(asked[2:], **options)] != [t.ids for t in last]
    with pytest.raises(ValueError, match="first=-1: give a whole number, 0 or more"):
        model.generate(asked, first=-1)


def test_no_tokens_asked_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_new_tokens=0: give a whole number, 1 or more"):
        Model(*tiny("llama")).generate("a", max_new_tokens=0)


def test_a_cache_with_room_is_the_plain_one_bit_for_bit() -> None:
    """Growing past its room, cropped, rows selected and repeated, in any order; what was there before it had room is kept."""
    torch.manual_seed(0)
    for draw in range(20):
        plain, roomy = DynamicLayer(), DynamicCache()
        if draw % 2:
            first = torch.randn(3, 2, 5, 4)
            plain.update(first, first + 1)
            roomy.update(first, first + 1, 0)
        else:
            roomy.layers = [DynamicLayer()]
        cache = with_room(roomy)
        layer = cache.layers[0]
        assert type(layer) is Roomy
        for _ in range(30):
            rows = len(plain.keys) if plain.is_initialized else 3
            new = torch.randn(rows, 2, int(torch.randint(1, 30, ())), 4)
            for a, b in zip(plain.update(new, -new), layer.update(new, -new), strict=True):
                assert torch.equal(a, b)
            what = int(torch.randint(0, 5, ()))
            if what == 0:
                plain.crop(-1), layer.crop(-1)
            elif what == 1 and rows > 1:
                plain.batch_select_indices(torch.tensor([1])), layer.batch_select_indices(torch.tensor([1]))
            elif what == 2 and rows < 8:
                plain.batch_repeat_interleave(2), layer.batch_repeat_interleave(2)
            assert layer.get_seq_length() == plain.get_seq_length()


def test_a_cache_with_room_widens_as_the_plain_one_does() -> None:
    plain, cache = DynamicLayer(), DynamicCache()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        new = torch.randn(1, 1, 3, 2).to(dtype)
        a = plain.update(new, new)[0]
        if not cache.layers:
            cache.update(new, new, 0)
            cache = with_room(cache)
            continue
        b = cache.update(new, new, 0)[0]
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def test_what_a_checkpoint_says_of_generation_has_no_say() -> None:
    """Qwen's repeat penalty, say: the likeliest token is the likeliest token, and the settings are the model's again afterwards."""
    model = Model(*tiny("llama"))
    ids, mask, _ = batch(model)
    module: Any = model.module
    plain = decode(model, ids, mask, 12)
    said = GenerationConfig(repetition_penalty=5.0, suppress_tokens=[row[0] for row in plain], eos_token_id=END)
    module.generation_config = said
    assert decode(model, ids, mask, 12) == plain
    assert module.generation_config is said


def test_the_end_of_a_turn_ends_a_completion(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    model = Model.load(folder)
    (written,) = model.generate("a question", max_new_tokens=12)
    turn = written.ids[written.spans["prompt"][1] + 2]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [END, turn]}))
    chat = Model.load(folder)
    (ended,) = chat.generate("a question", max_new_tokens=12)
    assert ended.finished
    assert ended.ids == written.ids[: len(ended.ids)]
    assert ended.ids[-1] == turn
    assert chat.transcript("a question", "7").ids[-1] == END  # a text still ends as the tokenizer has it

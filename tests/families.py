"""Tiny random models of every family, built from configs alone.

Their weights are drawn wide, gains and biases too, so that logits depend on every entry; wherever the family's config
allows, query heads share keys, a head's width is not the stream's divided by the heads, and the embedding is tied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "ĊĠ" + "".join(chr(code) for code in range(33, 127))  # line break, space and the visible ASCII, as bytes
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

HIDDEN, LAYERS, HEADS, KEY_HEADS, HEAD_WIDTH, INNER = 32, 3, 4, 2, 12, 40
WINDOW = 5  # tokens: shorter than any prompt, so that the sliding layers really slide

_COMMON = {
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_WIDTH,
}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _GROUPED),  # biases on q, k and v
    "qwen3": ("Qwen3Config", _GROUPED),  # norms on q and k, per head
    # norms after as well as before, gains stored less one, capped scores and logits
    "gemma2": (
        "Gemma2Config",
        _GROUPED
        | _ALTERNATING
        | {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    ),
    "gemma3": ("Gemma3TextConfig", _GROUPED | _ALTERNATING | {"query_pre_attn_scalar": 10}),
    "olmo2": ("Olmo2Config", _GROUPED),  # norms after only; norms on all of q and k
    "phi3": ("Phi3Config", _GROUPED),  # q, k, v in one matrix, gate and up in another
    # [in, out] matrices, q, k, v in one, learned positions
    "gpt2": (
        "GPT2Config",
        {name: value for name, value in _COMMON.items() if name != "max_position_embeddings"}
        | {"n_positions": 512, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER},
    ),
    # q, k, v in one matrix, head by head; attention and MLP side by side
    "gpt-neox": (
        "GPTNeoXConfig",
        _COMMON
        | {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "rotary_pct": 0.5,
            "use_parallel_residual": True,
        },
    ),
}

FAMILIES = tuple(_CONFIGS)


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, tied: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model of the family in eval mode, and a tokenizer of single characters.

    3 layers, width 32, 100 tokens. The same seed gives the same weights. KeyError for a family not in `FAMILIES`.
    """
    import transformers

    name, settings = _CONFIGS[family]
    config = getattr(transformers, name)(**settings, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    _widen_(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval(), characters()


def save_tiny(family: str, folder: Path | str, shards: int = 1, **options: Any) -> Path:
    """Write `tiny(family, **options)` as a Hugging Face folder.

    shards: number of weight files; more than one comes with an index.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    model, tokenizer = tiny(family, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shards > 1:
        whole = folder / "model.safetensors"
        tensors = load_file(whole)
        whole.unlink()
        names = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for file in sorted(set(names.values())):
            share = {name: tensor for name, tensor in tensors.items() if names[name] == file}
            save_file(share, folder / file, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of single ASCII characters whose chat template has the question in it verbatim."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # BPE that merges nothing: some families' tokenizer classes put byte-level splitting and decoding in by themselves.
    plain = Tokenizer(models.BPE(VOCABULARY, [], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def _widen_(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter in place: matrices N(0, 0.3), embeddings N(0, 1), gains up to 0.5 off, biases N(0, 0.5)."""
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, w in sorted(model.named_parameters()):
            if w.ndim > 1:
                w.normal_(0, 1.0 if w is embedding else 0.3, generator=generator)
            elif name.endswith("bias"):
                w.normal_(0, 0.5, generator=generator)
            else:
                w.add_(torch.rand(w.shape, generator=generator) - 0.5)

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

# experts in some or all layers
_EXPERTS = 4
_SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": _EXPERTS, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        _GROUPED
        | {"num_experts": _EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    # a shared expert beside the chosen ones, and a dense layer
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {name: value for name, value in _GROUPED.items() if name != "head_dim"}
        | {"num_experts": _EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
        | {"shared_expert_intermediate_size": 28},
    ),
}
SPARSE_FAMILIES = tuple(_SPARSE)


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, tied: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model of the family in eval mode, and a tokenizer of single characters.

    3 layers, width 32, 100 tokens. The same seed gives the same weights. KeyError for a family not in `FAMILIES` or `SPARSE_FAMILIES`.
    """
    import transformers

    name, settings = (_CONFIGS | _SPARSE)[family]
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


# --- vision-language models ---------------------------------------------------------------------------------------------------

IMAGE = len(VOCABULARY)  # the first of four rows that only the vision-language model has
_VISION = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_SQUARE = {name: value for name, value in _GROUPED.items() if name != "head_dim"} | {"rms_norm_eps": 1e-6}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}

# family -> its config, the class and the settings of its tower, the language model with such a tower, vision and other settings
_VLMS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "LlavaConfig", "LlamaConfig", _GROUPED, "LlamaConfig",
        _VISION | {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20, "projection_dim": 16},
        {"image_token_index": IMAGE, "image_seq_length": 4},
    ),
    "qwen2-vl": (
        "Qwen2VLConfig", "Qwen2VLTextConfig", _SQUARE | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}, "Qwen2Config",
        {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4},
        _QWEN,
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig", _SQUARE | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}, "Qwen2Config",
        {"depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "window_size": 16}
        | {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
        _QWEN,
    ),
    "idefics3": (
        "Idefics3Config", "LlamaConfig", _GROUPED, "LlamaConfig",
        _VISION | {"hidden_size": 16, "intermediate_size": 20},
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "smolvlm": (
        "SmolVLMConfig", "LlamaConfig", _GROUPED, "LlamaConfig",
        _VISION | {"hidden_size": 16, "intermediate_size": 20},
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "gemma3": (
        "Gemma3Config", "Gemma3TextConfig", _CONFIGS["gemma3"][1], "Gemma3TextConfig",
        _VISION | {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 20},
        {"image_token_index": IMAGE, "boi_token_index": IMAGE + 1, "eoi_token_index": IMAGE + 2, "mm_tokens_per_image": 4},
    ),
}  # fmt: skip
VLM_FAMILIES = tuple(_VLMS)

# How files name what the live module calls otherwise: (module, file), the first that fits. "new" is what transformers 4.52 to 4.57
# saved, "old" what came before and what transformers 5 saves.
_OLD_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
)
_NEW_LLAVA = (("model.vision_tower.", "model.vision_tower.vision_model."),)
_OLD_QWEN = (("model.language_model.", "model."), ("model.visual.", "visual."))
_LAYOUTS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("llava", "old"): _OLD_LLAVA, ("llava", "new"): _NEW_LLAVA, ("gemma3", "old"): _OLD_LLAVA, ("gemma3", "new"): _NEW_LLAVA,
    ("qwen2-vl", "old"): _OLD_QWEN, ("qwen2.5-vl", "old"): _OLD_QWEN,
}  # fmt: skip


def tiny_vlm(
    family: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    tied: bool = True,
    vocab: int = len(VOCABULARY) + 4,
    language: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A random vision-language model of the family in eval mode. KeyError for a family not in `VLM_FAMILIES`.

    vocab:    rows of the embedding. language: a `tiny_language` whose weights the tower gets; rows that one of them lacks stay random.
    """
    import transformers

    name, tower, text, _, vision, rest = _VLMS[family]
    config = getattr(transformers, name)(
        text_config=getattr(transformers, tower)(**text | {"vocab_size": vocab}, tie_word_embeddings=tied).to_dict(),
        vision_config=vision,
        tie_word_embeddings=tied,
        **rest,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # CLIP draws its class embedding
        model = transformers.AutoModelForImageTextToText.from_config(config)
    _widen_(model, torch.Generator().manual_seed(seed))
    if language is not None:
        inner = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
        with torch.no_grad():
            mine = dict(inner.named_parameters()) | {"lm_head": model.lm_head.weight}
            for name, w in [*language.model.named_parameters(), ("lm_head", language.lm_head.weight)]:
                rows = min(len(w), len(mine[name]))
                mine[name][:rows] = w[:rows]
    return model.to(dtype).eval()


def tiny_language(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, tied: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The language model with the very tower of `tiny_vlm(family)`, but for its vocabulary: 100 rows."""
    import transformers

    _, _, text, plain, _, _ = _VLMS[family]
    settings = text | {"rope_parameters": _ROPE} if "qwen" in family else text
    config = getattr(transformers, plain)(**settings, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    _widen_(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval(), characters()


def save_tiny_vlm(family: str, folder: Path | str, layout: str = "new", **options: Any) -> Path:
    """Write `tiny_vlm(family, **options)` as a Hugging Face folder with the tensor names of an "old" or a "new" file, or the module's own."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True)
    model = tiny_vlm(family, **options)
    rules = _LAYOUTS.get((family, layout), ())
    tensors = {}
    for name, w in model.named_parameters():  # a tied head is not repeated
        module, file = next(((m, f) for m, f in rules if name.startswith(m)), ("", ""))
        tensors[file + name.removeprefix(module)] = w.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    characters().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": False, "image_mean": [0.5, 0.5, 0.5]}))
    return folder

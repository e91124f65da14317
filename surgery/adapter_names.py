"""What the files and tensors of a PEFT adapter are called, and which of a model's tensors they mean: names alone, without torch."""

from __future__ import annotations

from collections.abc import Iterable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADDING = ("lora_", "shira_")  # how the parts are called, in a live module, of adapters that add to a matrix
_KINDS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
_WRAPPERS = {
    "base_model", "model", "language_model", "text_model", "vision_model", "transformer", "gpt_neox", "module", "_orig_mod",
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "modules_to_save",
}  # fmt: skip
_ALIASES = {"embed_out": "lm_head"}


def split_key(key: str) -> tuple[str, str | None]:
    """A key as the module it names and the kind of tensor; no kind where it is a tensor of the base itself."""
    segments = key.split(".")
    at = next((i for i, segment in enumerate(segments) if segment in _KINDS), None)
    if at is None:
        return key, None
    rest = segments[at + 1 :]
    bias = rest[-1:] == ["bias"]
    if len([s for s in rest if s not in ("weight", "bias")]) > 1:  # at most the adapter's name
        return key, None
    return ".".join(segments[:at]), segments[at] + (".bias" if bias else "")


def without_wrappers(name: str) -> str:
    return ".".join(_ALIASES.get(s, s) for s in name.split(".") if s not in _WRAPPERS)


class Names:
    """Which of a model's own names is meant by an adapter's.

    Wrappers come and go with versions (``model.language_model.layers``, ``language_model.model.layers``), so where no name is equal, the
    one that is equal without them counts, if there is only one.

    embedding: the name of the embedding where the head is tied to it, so that it is meant by the head's name too.
    """

    def __init__(self, names: Iterable[str], embedding: str | None):
        self._names, self._embedding = set(names), embedding
        self._bare: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._bare.setdefault(without_wrappers(name), []).append(name)

    def find(self, key: str) -> str | None:
        wrapped = [key.removeprefix("base_model.model."), key.removeprefix("base_model."), key]
        exact = [name for name in wrapped if name in self._names]
        if exact:
            return exact[0]
        bare = without_wrappers(key)
        found = self._bare.get(bare, [])
        if not found and bare == "lm_head.weight":
            return self._embedding
        return found[0] if len(found) == 1 else None

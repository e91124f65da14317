"""Two folders beside each other: whether their weights may be added, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.headers import UNTIE
from surgery.preflight.facts import SHORT, Facts, Problem
from surgery.sites import UNNAMED, Site

_GARBAGE = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
)  # weights learned under one mean nothing under another
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "sliding_window", "partial_rotary_factor", "rotary_pct", "attention_multiplier", "residual_multiplier", "embedding_multiplier",
)  # fmt: skip


def compare(a: Facts, b: Facts, *, layers: bool = True, vocabulary: bool = True) -> list[Problem]:
    """What stands against merging `b` with `a`, whose configuration and tokenizer the result would get.

    layers: whether the counts must agree (not where a recipe takes ranges). vocabulary: whether rows must (not where the recipe names
    a tokenizer source, which lines them up).
    """
    if a.family != b.family:
        found = f"is a {b.family}, and {a.ref} is a {a.family}"
        return [
            Problem(
                "error",
                "architecture",
                b.ref,
                found,
                "Merge models of one architecture; a language model goes into a vision-language one with `surgery apply`",
            )
        ]
    problems = [*_sizes(a, b, layers), *_rope(a, b), *_rest(a, b), *_tie(a, b), *_dtypes(a, b), *_templates(a, b)]
    problems += [*_rows(a, b, vocabulary), *_tokens(a, b, vocabulary)]
    if not any(p.kind in ("layers", "width", "heads", "tie") and p.severity == "error" for p in problems):
        problems += _tensors(a, b, layers, rows_said=any(p.kind == "vocabulary" for p in problems) or not vocabulary)
    return problems


def _sizes(a: Facts, b: Facts, layers: bool) -> Iterator[Problem]:
    names = {
        "num_hidden_layers": ("layers", "layers"), "hidden_size": ("width", "wide"), "intermediate_size": ("width", "wide in the MLP"),
        "num_attention_heads": ("heads", "attention heads"), "num_key_value_heads": ("heads", "key/value heads"), "head_dim": ("heads", "wide in a head"),
    }  # fmt: skip
    fixes = {
        "layers": "Take ranges of layers (slices: with layer_range:), or another model",
        "width": "Use a model of the same size",
        "heads": "Use a model with the same heads: their shapes may agree, but heads would be mixed with others",
    }
    for key, (kind, words) in names.items():
        one, other = a.get(key), b.get(key)
        if one is not None and other is not None and one != other and (layers or kind != "layers"):
            found = (
                f"has {other} {words}, and {a.ref} {one}"
                if kind != "width"
                else f"is {other} {words}, and {a.ref} {one}"
            )
            yield Problem("error", kind, b.ref, found, fixes[kind])


def _rope(a: Facts, b: Facts) -> Iterator[Problem]:
    one, other = a.rope(), b.rope()
    if one["theta"] is not None and other["theta"] is not None and float(one["theta"]) != float(other["theta"]):
        found = f"rotates with theta {other['theta']:g}, and {a.ref} with {one['theta']:g}: queries and keys learned for one do not fit the other"
        fix = "Merge models tuned from one base; a model with a longer context is one only if its theta was kept"
        yield Problem("error", "rope", b.ref, found, fix)
    elif (one["theta"] is None) != (other["theta"] is None):
        silent = b if other["theta"] is None else a
        found = f"does not say its rope_theta, so that its class's default holds; the other says {one['theta'] or other['theta']:g}"
        yield Problem("note", "rope", silent.ref, found, "Make sure that they are the same number")
    if one["scaling"] != other["scaling"]:
        found = f"scales its rotation by {other['scaling'] or 'nothing'}, and {a.ref} by {one['scaling'] or 'nothing'}"
        fix = f"The result keeps {a.ref}'s: name as base_model the model whose context length is wanted"
        yield Problem("warning", "rope", b.ref, found, fix)


def _rest(a: Facts, b: Facts) -> Iterator[Problem]:
    for key in (*_GARBAGE, *_NUMBERS):
        one, other = a.get(key), b.get(key)
        if one is not None and other is not None and one != other:
            severity = "error" if key in _GARBAGE else "warning"
            fix = (
                "Merge models that compute alike"
                if key in _GARBAGE
                else f"The result keeps {a.ref}'s {key}: make sure that this is meant"
            )
            yield Problem(severity, "config", b.ref, f"has {key} {other}, and {a.ref} {one}", fix)


def _tie(a: Facts, b: Facts) -> Iterator[Problem]:
    if a.tied is not None and b.tied is not None and a.tied != b.tied:
        words = {True: "ties its head to the embedding", False: "has a head of its own"}
        found = f"{words[b.tied]}, and {a.ref} {words[a.tied]}"
        tied = a.ref if a.tied else b.ref
        fix = f"Untie {tied} first: {UNTIE}"
        yield Problem("error", "tie", b.ref, found, fix)


def _dtypes(a: Facts, b: Facts) -> Iterator[Problem]:
    one, other = (max((c for c in f.dtypes if c in SHORT), key=f.dtypes.__getitem__, default=None) for f in (a, b))
    if one and other and one != other:
        found = f"is stored in {SHORT[other]}, and {a.ref} in {SHORT[one]}"
        fix = f"The result is stored like {a.ref}, computed in float32; --dtype (or out_dtype:) chooses another"
        yield Problem("warning" if SHORT[one] in ("bfloat16", "float16") else "note", "dtype", b.ref, found, fix)


def _templates(a: Facts, b: Facts) -> Iterator[Problem]:
    if a.template == b.template:
        return
    if a.template is None or b.template is None:
        has, lacks = (b, a) if a.template is None else (a, b)
        fix = f"The result gets {a.ref}'s" + (
            ": name as base_model the one that should speak, or write chat_template: auto"
            if has is b
            else "; nothing to do if that is meant"
        )
        yield Problem(
            "warning" if has is b else "note",
            "template",
            b.ref,
            f"differs in the chat template: {has.ref} has one, {lacks.ref} none",
            fix,
        )
        return
    first = next(
        (i for i, (x, y) in enumerate(zip(a.template, b.template, strict=False)) if x != y),
        min(len(a.template), len(b.template)),
    )
    found = f"has another chat template than {a.ref} (from character {first} on: {b.template[first : first + 30]!r} against {a.template[first : first + 30]!r})"
    fix = f"The result gets {a.ref}'s: prompt it so, or choose with chat_template: in a recipe"
    yield Problem("warning", "template", b.ref, found, fix)


def _rows(a: Facts, b: Facts, vocabulary: bool) -> Iterator[Problem]:
    one, other = a.rows(), b.rows()
    if one is None or other is None or one == other:
        return
    if vocabulary:
        fix = "In a recipe, write tokenizer_source: base (or union) to line the rows up; for a delta, use models of one vocabulary"
        yield Problem("error", "vocabulary", b.ref, f"has {other} rows in its embedding, and {a.ref} {one}", fix)
    else:
        found = f"has {other} rows in its embedding, and {a.ref} {one}; the tokenizer source lines them up"
        yield Problem("note", "vocabulary", b.ref, found, "Nothing to do")


def _tokens(a: Facts, b: Facts, vocabulary: bool) -> Iterator[Problem]:
    if a.tokenizer_hash == b.tokenizer_hash or a.tokenizer_hash is None or b.tokenizer_hash is None:
        return
    fix = "In a recipe, write tokenizer_source: base (or union), which lines rows up by token"
    if not a.vocabulary or not b.vocabulary:
        found = f"has other tokenizer files than {a.ref}; what differs cannot be told from them"
        yield Problem("warning" if vocabulary else "note", "tokenizer", b.ref, found, fix)
        return
    moved = [t for t, i in a.vocabulary.items() if t in b.vocabulary and b.vocabulary[t] != i]
    ids = {i: t for t, i in a.vocabulary.items()}
    swapped = [(i, t) for t, i in b.vocabulary.items() if i in ids and ids[i] != t]
    if moved or swapped:
        first = (
            f"{moved[0]!r} is {b.vocabulary[moved[0]]} there and {a.vocabulary[moved[0]]} here"
            if moved
            else f"{swapped[0][0]} is {swapped[0][1]!r} there and {ids[swapped[0][0]]!r} here"
        )
        found = f"numbers its tokens otherwise than {a.ref}: {max(len(moved), len(swapped))} differ, first {first}; rows of different tokens would be mixed"
        yield Problem("error" if vocabulary else "note", "tokenizer", b.ref, found, fix)
    else:
        extra, fewer = len(b.vocabulary.keys() - a.vocabulary.keys()), len(a.vocabulary.keys() - b.vocabulary.keys())
        found = (
            f"has {extra} tokens that {a.ref} lacks and lacks {fewer} of its tokens; those they share have the same ids"
        )
        yield Problem(
            "warning" if vocabulary else "note",
            "tokenizer",
            b.ref,
            found,
            f"The result gets {a.ref}'s tokenizer. {fix}",
        )


def _tensors(a: Facts, b: Facts, layers: bool, rows_said: bool) -> Iterator[Problem]:
    """Names and shapes, once geometry agrees: what else keeps two folders apart."""
    one = {n: t.shape for n, t in a.tensors.items()}
    other = {n: t.shape for n, t in b.tensors.items()}
    if a.anatomy is not None and b.anatomy is not None:
        one, other = (dict(x) for x in (a.shapes(), b.shapes()))
    if not layers:  # ranges of layers: only what lies outside of them must agree
        one, other = (
            {n: s for n, s in t.items() if not n[:1].isdigit() and ".layers." not in n and ".h." not in n}
            for t in (one, other)
        )
    vocabulary = {
        n
        for n in one.keys() & other.keys()
        if rows_said and one[n] and other[n] and one[n][1:] == other[n][1:] and n in ("embed", "head", "head.bias")
    }
    shapes = [n for n in one if n in other and one[n] != other[n] and n not in vocabulary]
    if shapes:
        rows = "; ".join(f"{n}: {other[n]} against {one[n]}" for n in shapes[:3])
        yield Problem(
            "error",
            "shapes",
            b.ref,
            f"differs from {a.ref} in {len(shapes)} shapes, first {rows}",
            "Use a model of the same size and architecture",
        )
    for have, lack, names in ((a, b, one.keys() - other.keys()), (b, a, other.keys() - one.keys())):
        weights = sorted(name for name in names if _is_weight(have, name))
        rest = sorted(name.removeprefix(UNNAMED) for name in names if not _is_weight(have, name))
        if weights:
            found = f"lacks {len(weights)} tensors that {have.ref} has, first {', '.join(weights[:3])}"
            fix = f"Download {lack.ref} again if it should have them, or use models with the same tensors"
            yield Problem("error", "tensors", lack.ref, found, fix)
        if rest and have is b:
            found = (
                f"has {len(rest)} tensors that {a.ref} lacks, first {', '.join(rest[:3])}: the result is without them"
            )
            fix = f"Nothing to do if that is meant; otherwise use models with the same tensors, or {b.ref} as base"
            yield Problem("warning", "tensors", b.ref, found, fix)
        elif rest:
            found = f"lacks {len(rest)} tensors that {a.ref} has, first {', '.join(rest[:3])}: the result has those of {a.ref}"
            yield Problem("note", "tensors", b.ref, found, "Nothing to do")


def _is_weight(facts: Facts, name: str) -> bool:
    """Whether a tensor, by its site or by its name in the files, belongs to the model as its family is known: as in a merge."""
    if facts.anatomy is None or not name.startswith(UNNAMED):
        return True
    stored = facts.tensors[facts.anatomy.places[Site(None, name)].name]
    return facts.anatomy.tower is not None and stored.code in SHORT

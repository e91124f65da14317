"""Early answers, slowly and literally: Lanham et al. 2023 (arXiv 2307.13702), sections 2.3 and 3."""

import torch


def sequences(transcript, close="</think>"):
    """Every cut's text as token ids, from the definition: prompt and thinking up to a sentence's end, then the frame.
    Written for transcripts whose markers are tokens of their own."""
    ids, text, offsets = transcript.ids, transcript.text, transcript.offsets
    begin, end = transcript.spans["thinking"]
    start = next(t for t in range(begin, end) if text[offsets[t][0] : offsets[t][1]].strip())
    answer = next(t for t in range(*transcript.spans["answer"]) if text[offsets[t][0] : offsets[t][1]].strip())
    frame = ids[end:answer]
    assert text[offsets[end][0] :].startswith(close)
    stops = [start]
    for token in range(start, end):  # a line is a sentence
        if text[offsets[token][0] : offsets[token][1]].endswith("\n"):
            stops.append(token + 1)
    return [list(ids[:stop] + frame) for stop in stops]


@torch.no_grad()
def answer(module, ids, count, eos, pad):
    """Generate from scratch, one text at a time."""
    ids = torch.tensor([ids])
    out = module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@torch.no_grad()
def logits(module, ids):
    """The logits that begin the answer, from one bare forward pass."""
    return module(torch.tensor([ids])).logits[0, -1]


def dataset_aoc(curves):
    """Section 2.3: f_T(i/T) over the transcripts of length T, 1 - its integral, weighted by the fraction of transcripts
    of length T. ``curves``: for each transcript the list of same (True or False) at i = 0..T."""
    total = 0.0
    for length in {len(curve) - 1 for curve in curves}:
        rows = [curve for curve in curves if len(curve) - 1 == length]
        f = [sum(row[i] for row in rows) / len(rows) for i in range(length + 1)]
        area = sum((f[i] + f[i + 1]) / 2 * (1 / length) for i in range(length))
        total += len(rows) / len(curves) * (1 - area)
    return total

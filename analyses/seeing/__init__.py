"""Seeing and reasoning: does a language model's skill reach a vision-language model better by DRIFT than by training or merging alone?

Everything is made here, from a seed, in minutes on a CPU. A small llama learns to copy an expression and to work short sums out; its
*expert* is the same model tuned further, on long ones. A vision encoder learns scikit-learn's handwritten digits. A llava of the two
learns to read pictured digits aloud, between short sums in text: that is the model to be tuned. The task is long sums whose digits are
pictures: read them, then work the sum out, in the thinking. From the model's tower to the expert is DRIFT's prior D.

    untuned     the vision-language model as it was
    merge       untuned + m·D without training; m is the best of several on training sums drawn anew
    sft         trained on a few hundred pictured sums
    drift       the same, its gradients bent toward the expert
    random      the same, bent toward noise with the norm of D in every matrix (so "permuted" and "flipped", see `controlled`)
    merge-sft   untuned + c·D, then trained as sft: c is, in every matrix, how much further along D drift came than sft
    sft-merge   sft + c·D: as far along D as drift, in every matrix, without any bending

    found = seeing(seeds=(0, 1, 2))
    found.frame(), found.differences("drift"), found.plot()

Whether drift does more than ``sft-merge`` and ``merge-sft`` is the question that tells a rule for gradients from a merge.

pictures   the handwritten digits, and sums with and without pictures
learning   one Trainer for all
models     Course, world(): what the arms begin with
answers    answers(), surprise(), judge()
study      seeing(), Tuning (the arms), Seeing
"""

from analyses.seeing.models import Course as Course
from analyses.seeing.models import world as world
from analyses.seeing.study import ARMS as ARMS
from analyses.seeing.study import Arm as Arm
from analyses.seeing.study import Seeing as Seeing
from analyses.seeing.study import Tuning as Tuning
from analyses.seeing.study import seeing as seeing

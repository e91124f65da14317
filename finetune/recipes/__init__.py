"""Data recipes: transcripts in, transcripts or `Example`s out. Each names its paper; what it did stands in ``meta["recipes"]``.

retelling   a transcript with other words in it, cut short, or taken apart into steps; graders
equations   the arithmetic that a text claims, and whether it holds
selection   which transcripts are learnt: rejection sampling (RFT), seldom right, long and short, prefixes (UPFT), single steps (DCO), pairs by
            length (ThinkPO), no question (QFFT)
steps       steps shuffled, deleted, inserted, miscounted; prefixes with one flaw in them
critical    the tokens whose replacement ruins the answer

A grader is any function ``Transcript -> True | False | None`` (None: there is no answer); ``grader(questions, tasks.grade)`` makes one.
A recipe that leaves nothing to learn raises ValueError. Random choices about item i depend on ``(seed, i)`` alone.
"""

from finetune.recipes.critical import critical_tokens as critical_tokens
from finetune.recipes.equations import Equation as Equation
from finetune.recipes.equations import equations as equations
from finetune.recipes.retelling import Grader as Grader
from finetune.recipes.retelling import Steps as Steps
from finetune.recipes.retelling import cut as cut
from finetune.recipes.retelling import grader as grader
from finetune.recipes.retelling import retold as retold
from finetune.recipes.selection import length_pairs as length_pairs
from finetune.recipes.selection import long_short as long_short
from finetune.recipes.selection import one_step_each as one_step_each
from finetune.recipes.selection import prefix_entropy as prefix_entropy
from finetune.recipes.selection import prefix_only as prefix_only
from finetune.recipes.selection import question_free as question_free
from finetune.recipes.selection import rejection_sampled as rejection_sampled
from finetune.recipes.selection import seldom_right as seldom_right
from finetune.recipes.selection import shortest_right as shortest_right
from finetune.recipes.steps import FLAWS as FLAWS
from finetune.recipes.steps import corrupt_digits as corrupt_digits
from finetune.recipes.steps import delete_steps as delete_steps
from finetune.recipes.steps import flawed_prefix as flawed_prefix
from finetune.recipes.steps import insert_steps as insert_steps
from finetune.recipes.steps import shuffle_steps as shuffle_steps

"""LIFT: fine-tune only the principal weights, those that are largest after rank reduction.

warm       the filter begun from that of the last refresh
selection  principal_indices(), which says which entries those are, and what they are compared with
shards     the same choice where every process has some rows of each matrix
halves     float32 numbers whose upper half is a 16-bit weight
ledger     the compact state of the chosen entries
optimizer  LIFT, the optimizer that trains them and nothing else

Source: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
    Supervised Fine-Tuning", arXiv 2506.00772, Algorithm 1.
Differs: the released code's configurations train the *smallest* entries, which is `select="smallest"` here. Steps are float32 whatever
    the weights are, bias correction follows each entry's own age, gradients are gathered and freed as they arrive, and
    weight decay acts.
"""

from finetune.lift.optimizer import LIFT, Gathered, Refresh, Scope, lift_of, matrices_of
from finetune.lift.selection import Select, budget, principal_indices

__all__ = ["LIFT", "Gathered", "Refresh", "Scope", "Select", "budget", "lift_of", "matrices_of", "principal_indices"]

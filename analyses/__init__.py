"""What it all means. Read in this order:

statistics      intervals of means, shares and differences; tests; lengths that were cut off
tasks           questions with checkable answers, as a teacher works them; grading
scoring         negative log-likelihood over spans and of plain text
general_text    plain passages on everyday subjects
faithfulness    is the chain of thought used? early answers
representation  drift of activations and outputs between two models
geometry        which weights moved, and how
shelf           finished parts of long work, so that it can go on
changes, dose   what a steering, an edit or a task vector does at each strength, beside random ones
arms            ways of tuning side by side, over seeds: what each learnt and what it kept
labels          what a probe is asked to read of a transcript: right, long, or anything kept with it
thinkedit       length direction, the heads that write it, the edit, and what it does beside its controls
donors          what reinforcement changed in a model, and what that does in a sibling
controls        planted models whose true score is known
seeing          a vision-language model that learns sums: training, DRIFT and merges, side by side
watch           these measures as monitors for the training loop
style, figures  one function a figure
report          a page of tables and figures
flight          flight_recorder(): all of them within a share of the training time, and the page of the run
plan, study     the main job
cli             the command line
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyses.changes import Editing as Editing
    from analyses.dose import sweep as sweep
    from analyses.faithfulness import early_answers as early_answers
    from analyses.flight import Flight as Flight
    from analyses.flight import flight_recorder as flight_recorder
    from analyses.plan import Plan as Plan
    from analyses.representation import drift as drift
    from analyses.tasks import Question as Question
    from analyses.tasks import accuracy as accuracy
    from analyses.tasks import chained_sums as chained_sums
    from analyses.thinkedit import Recipe as Recipe
    from analyses.thinkedit import ThinkEdit as ThinkEdit

_HOMES = {
    "Editing": "changes",
    "Flight": "flight",
    "Plan": "plan",
    "Question": "tasks",
    "Recipe": "thinkedit",
    "ThinkEdit": "thinkedit",
    "accuracy": "tasks",
    "chained_sums": "tasks",
    "drift": "representation",
    "early_answers": "faithfulness",
    "flight_recorder": "flight",
    "sweep": "dose",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"analyses.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'analyses' has no attribute {name!r}")

"""Merging: mergekit's recipes and mergekit's rules, over our stream.

A recipe is mergekit's YAML, unchanged. mergekit's own classes parse it, plan it and hold the rules; what is ours is around them:
references are checked before anything is computed, tensors come by file name from `Checkpoint`, one output tensor exists at a time,
and `write` hashes, verifies and renames. A new tokenizer is built by mergekit, and the stream lines up the embeddings' rows by its
rules. Several GPUs and families that only mergekit knows go through mergekit's own executor into a temporary folder, and pass the same
verification before the result appears.

Differs: mergekit computes in the dtype it finds, or in the recipe's ``dtype``; here arithmetic is float32 (float64 where the recipe
says so) and ``out_dtype``, else ``dtype``, only says what is stored. ``surgery: {compute: mergekit}`` in the recipe computes as
mergekit does. Random methods draw from a generator of their own for each seed, tensor and model, so that neither the order of the
tensors nor the number of threads matters; mergekit draws all from one. Tensors that mergekit's table of the architecture does not
list are the base model's own here; mergekit leaves them out. Where that table does not fit the files, as of models with experts and of
many vision-language models, the files' own tensors are merged, each by itself: mergekit takes all experts of a layer for one tensor,
which is the same only to rules that look at one entry at a time. Among changes of equal magnitude TIES takes evenly; mergekit's sort
does not.

recipe     Recipe, read_recipe(): what the YAML says
rules      how one output tensor comes about
planning   plan(): what will happen, from configurations and headers
table      table(): which tensors there are, where mergekit's own table does not fit the files
vocabulary the tokens that a recipe's tokenizer asks for, and the embeddings' rows lined up by them
point      Merged: the merged weights, computed when read
running    merge(): from a plan to a folder
"""

from surgery.merging.planning import Plan as Plan
from surgery.merging.planning import plan as plan
from surgery.merging.point import Merged as Merged
from surgery.merging.recipe import Recipe as Recipe
from surgery.merging.recipe import RecipeError as RecipeError
from surgery.merging.recipe import read_recipe as read_recipe
from surgery.merging.running import RECIPE as RECIPE
from surgery.merging.running import MergedModel as MergedModel
from surgery.merging.running import merge as merge

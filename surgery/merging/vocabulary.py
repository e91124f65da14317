"""The vocabulary that a recipe's ``tokenizer:`` asks for, and the rows of the models' embeddings lined up by its tokens: mergekit's own rules.

mergekit looks up how many tokens a model has where the configurations of most vision-language models do not say it, and then takes none
of the tokens that were added to another model's tokenizer, and none beyond the number of its tokens. Here it is told the number of rows.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.headers import read_config
from surgery.merging.recipe import RecipeError
from surgery.side_files import copy_file, files_in, side_files
from surgery.sites import Site

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.io.tasks import GatherTensors
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.tokenizer import TokenizerInfo

    from surgery.checkpoint import Checkpoint
    from surgery.merging.rules import Source

_EMBED = Site(None, "embed")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a result.

    ids:   token -> its id. rows: of the embedding, which may be padded to a multiple.
    files: of the tokenizer, name -> content.
    info:  mergekit's own record of it, with each model's ids for the tokens.
    """

    ids: Mapping[str, int]
    rows: int
    files: Mapping[str, bytes]
    info: TokenizerInfo

    def line_up(
        self, task: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, Tensor]
    ) -> dict[ModelReference, Tensor]:
        """Each model's tensor with a row for each token, by mergekit's rule: its own, or that of the model the token comes from."""
        lining: Any = task.gather_tensors
        return lining.execute(tokenizer_info=self.info, tensors=dict(tensors))


def gathered(task: ExecuteMergeMethodTask) -> GatherTensors:
    """What a task takes from the models; where a vocabulary is built anew, that is inside another task."""
    gathering: Any = task.gather_tensors
    return getattr(gathering, "gather_tensors", gathering)


def vocabulary_of(
    tasks: Iterable[ExecuteMergeMethodTask],
    sources: Mapping[ModelReference, Source],
    names: Mapping[ModelReference, str],
) -> Vocabulary:
    """The vocabulary that mergekit's plan builds, from the models' tokenizers; no tensor is read. Raises RecipeError where it cannot be built."""
    from mergekit.common import ModelPath
    from mergekit.tokenizer.build import build_tokenizer

    lining: Any = next(task.gather_tensors for task in tasks if task.gather_tensors is not gathered(task))
    asked = lining.tokenizer_task
    with tempfile.TemporaryDirectory() as home:
        stands = {}
        for number, (ref, source) in enumerate(sources.items()):
            folder = _stand_in(source.layout, Path(home, str(number)))
            stands[ref] = ref.model_copy(update={"model": ModelPath(path=str(folder))})
        try:
            with redirect_stderr(io.StringIO()):  # its bars
                info = build_tokenizer(
                    stands.get(asked.base_model),
                    [stands[ref] for ref in asked.referenced_models],
                    asked.tokenizer_source,
                    trust_remote_code=False,
                    add_tokens=asked.add_tokens,
                )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
            for ref, stand in stands.items():
                said = said.replace(stand.model.path, names[ref])
            raise RecipeError(
                f"mergekit cannot build the tokenizer: {said}. Leave the tokenizer out of the recipe."
            ) from error
        ids = info.tokenizer.get_vocab()
        if max(ids.values(), default=-1) >= len(ids):
            raise RecipeError(
                f"The tokenizer built has {len(ids)} tokens with ids up to {max(ids.values())}: mergekit lines up only vocabularies without gaps. "
                "Leave the tokenizer out of the recipe, or fill the gaps of the model's tokenizer first."
            )
        back = {stand: ref for ref, stand in stands.items()}
        # a token beyond a model's rows is one that it has not
        info.permutations = {back[m]: {i: p.get(i, -1) for i in ids.values()} for m, p in info.permutations.items()}
        info.original_vocabs = {back[m]: own for m, own in info.original_vocabs.items()}
        saved = Path(home, "saved")
        info.tokenizer.save_pretrained(saved)
        files = {name: (saved / name).read_bytes() for name in files_in(saved)}
    multiple = lining.pad_to_multiple_of or 1
    return Vocabulary(ids, -(-len(ids) // multiple) * multiple, files, info)


def _stand_in(model: Checkpoint, folder: Path) -> Path:
    """A folder with a model's tokenizer, and its configuration with the number of its embedding's rows where mergekit looks for it."""
    folder.mkdir()
    for name in side_files(model.folder):
        copy_file(model.folder, folder, name)
    # of a name that no table of mergekit's has, which may say to look elsewhere
    said = read_config(model.folder) | {"vocab_size": model.shapes()[_EMBED][0], "architectures": ["Plain"]}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder

"""Models on the hub, looked at from afar: configuration, tokenizer files, index and headers are read, and of the weights nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from surgery.headers import DELTA, INDEX, MAX_HEADER, MAX_JSON, RECORD, SINGLE, CheckpointError, is_whole, read_index
from surgery.hub_ids import download_words, hub_id, refusal
from surgery.preflight.facts import MEANT, TOKENIZERS, Place, Problem, locate
from surgery.side_files import HUB_FILES

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_AT_ONCE = 16  # requests
_AGAIN = "Download it again"


class Hub:
    """Where the models of one check are, for the length of a ``with`` block, in which what was read from the hub is kept.

    download: bytes that a command would have to download first, for all models looked at.
    """

    def __init__(self) -> None:
        self.download = 0
        self._places: dict[str, Place | Problem] = {}
        self._names: dict[str, str] = {}  # of folders below `_home`

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        if "_home" in vars(self):
            self._home.cleanup()

    @cached_property
    def _home(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="surgery-check-")

    @cached_property
    def _silence(self) -> str | None:
        from surgery.specimen import hub_silence

        return hub_silence()

    def place(self, ref: str) -> Place | Problem:
        """A folder here, a copy in the hub's cache, or else what the hub says of a model without giving it; or why there is none."""
        if ref not in self._places:
            self._places[ref] = self._find(ref)
        return self._places[ref]

    def named(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems, with a hub id wherever they name the folder that stands for it."""
        return [self._named(problem) for problem in problems]

    def _named(self, problem: Problem) -> Problem:
        for folder, ref in self._names.items():
            if folder in problem.where + problem.found + problem.fix:
                words = {key: getattr(problem, key).replace(folder, ref) for key in ("where", "found", "fix")}
                words["fix"] = words["fix"].replace(_AGAIN, "It is so on the hub: take another revision or model")
                problem = replace(problem, **words)
        return problem

    def _find(self, ref: str) -> Place | Problem:
        here, fix = locate(ref)
        named = hub_id(ref)
        if here is not None and (named is None or here == Path(ref).expanduser() or is_whole(here)):
            return Place(here)
        if named is None:
            return Problem("error", "reference", ref, "is not here", fix)
        if self._silence is None:
            found = self._from_afar(ref, *named)
            return replace(found, fix=fix) if isinstance(found, Problem) and fix.startswith(MEANT) else found
        if here is not None:
            return Place(here)
        if "/" not in ref:
            return Problem("error", "reference", ref, "is not here", fix)
        fix = f"Let the hub be asked, which takes no more than its headers, or download it first: {download_words(*named)}"
        return Problem(
            "error", "reference", ref, f"is neither a folder nor in the hub's local cache, and {self._silence}", fix
        )

    def _from_afar(self, ref: str, name: str, revision: str) -> Place | Problem:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        folder = Path(self._home.name).resolve() / str(len(self._names)) / ref.replace("/", "--")
        try:
            told = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_patience())
            folder.mkdir(parents=True)
            self._names[str(folder)] = ref
            return self._fetch(told, name, folder)
        except _TooLargeError as error:
            return Problem("error", "file", f"{ref}/{error}", "is larger than any such file", "Correct the name")
        except (HTTPError, OSError, ValueError, TypeError, LookupError) as error:  # its answer may be of any shape
            found, fix = refusal(name, revision, error)
            return Problem("error", "reference", ref, found, fix)

    def _fetch(self, told: ModelInfo, name: str, folder: Path) -> Place:
        """The files that a check reads, the headers of the weights, and of the others nothing but their names."""
        from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import filter_repo_objects

        commit = str(told.sha)
        listed = {file.rfilename: file.size or 0 for file in told.siblings or ()}
        sizes = {file: size for file, size in listed.items() if Path(file).name == file}
        for file in sizes:
            (folder / file).touch()
        small = _read_whole(sizes)
        for file in small:
            if sizes[file] > MAX_JSON:
                raise _TooLargeError(file)

        def fetch(file: str) -> None:
            shutil.copyfile(hf_hub_download(name, file, revision=commit), folder / file)

        def head(file: str) -> None:
            url = hf_hub_url(name, file, revision=commit)
            first, size = _part(url, 0, min(8, sizes[file]))
            sizes[file] = size or sizes[file]
            length = int.from_bytes(first, "little")
            fits = len(first) == 8 and length <= min(MAX_HEADER, sizes[file] - 8)
            (folder / file).write_bytes(first + _part(url, 8, 8 + length)[0] if fits else first)

        with _no_bars(), ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                list(pool.map(fetch, small))
                list(pool.map(head, _weights(folder)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        wanted = filter_repo_objects(listed, **HUB_FILES)
        self.download += sum(
            listed[file] for file in wanted if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)
        )
        return Place(folder, {file: size for file, size in sizes.items() if file not in small})


class _TooLargeError(ValueError):
    """A file's name."""


def _read_whole(present: Iterable[str]) -> list[str]:
    """Of the files of a repository, those that a check reads."""
    present = set(present)
    tokenizer = [file for file in TOKENIZERS if file in present][:1]
    template = ["chat_template.jinja"]
    if not present.intersection(template):
        template = ["tokenizer_config.json", "chat_template.json"]
    wanted = ["config.json", "adapter_config.json", INDEX, RECORD, *tokenizer, *template]
    return [file for file in wanted if file in present]


def _weights(folder: Path) -> list[str]:
    """The files whose headers a check reads."""
    wanted = {SINGLE, "adapter_model.safetensors", DELTA}
    if (folder / INDEX).is_file():
        try:
            wanted = set(read_index(folder / INDEX).values())
        except CheckpointError:  # said by whoever judges the folder
            wanted = set()
    return sorted(file for file in wanted if (folder / file).is_file())


def _part(url: str, begin: int, end: int) -> tuple[bytes, int | None]:
    """The bytes of a file on the hub from `begin` up to `end`, and how many it has in all, None where that is not said."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if begin == end:
        return b"", None
    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_patience()) as answer:
        if answer.is_error:
            answer.read()  # its text says why
        hf_raise_for_status(answer)
        skipped = 0 if answer.status_code == 206 else begin  # a server that knows no ranges begins at the beginning
        found = bytearray()
        for piece in answer.iter_raw():
            found += piece
            if len(found) >= skipped + end - begin:
                break
    if len(found) < skipped + end - begin:
        raise OSError("its answer broke off")
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    return bytes(found[skipped : skipped + end - begin]), int(whole[1]) if whole else None


def _patience() -> float:
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of the hub's client: what is fetched is small."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

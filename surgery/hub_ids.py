"""Names of models on the hub: what may be one, and why the hub does not give it: whether it is gated, missing, or out of reach."""

from __future__ import annotations

import os
import re

_LONGEST = 96  # characters of a name, by the hub's rules
_LOGIN = "log in as one who may read it (hf auth login, or HF_TOKEN)"


def hub_id(ref: str) -> tuple[str, str] | None:
    """``owner/name`` and the revision after its ``@``, ``main`` by default, of what may be a hub id; None for what cannot.

    A few models have a name of before owners, such as ``gpt2``.
    """
    hit = re.fullmatch(r"((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?:@([\w.-]+(?:/[\w.-]+)*))?", ref)
    if hit is None or ".." in ref or len(hit[1]) > _LONGEST or os.path.isfile(ref):
        return None
    return hit[1], hit[2] or "main"


def download_words(name: str, revision: str) -> str:
    """The command that puts a hub id into the hub's local cache."""
    return f"hf download {name}" + ("" if revision == "main" else f" --revision {revision}")


def refusal(name: str, revision: str, error: Exception) -> tuple[str, str]:
    """What is so of a hub id whose files could not be had, and what to do about it. error: as the hub's client raised it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        found = f"is gated: the hub gives it to those only who were granted access ({status})"
        return found, f"Ask for access on its page on the hub, and {_LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision} on the hub", "Correct what follows the @, or leave it out"
    if isinstance(error, RepositoryNotFoundError):
        found = f"is neither a folder here nor a model that the hub shows to everybody ({status})"
        return found, f"Correct the name; if it is private, {_LOGIN}"
    if status in (401, 403):
        return f"is refused by the hub ({status})", f"Change the token that HF_TOKEN or `hf auth login` set: {_LOGIN}"
    why = f"it answers {status}" if status else str(error) or type(error).__name__
    found = f"is not here, and cannot be read from the hub: {why}"
    return found, f"Try again later, or download it first: {download_words(name, revision)}"

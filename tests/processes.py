"""Runs functions in several processes of one torch.distributed group (gloo, CPU), as ``torchrun`` would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_PRELOADED = [  # once, by the process from which the workers are forked
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "finetune.lift",
    "finetune.overlay",
    "tests.families",
]
Job = Callable[[int, int], Any]  # (rank, world) -> something that torch.save can write


def together(world: int, jobs: Mapping[str, Job], folder: Path, begun: bool = True) -> dict[str, list[Any]]:
    """What each job gives in each process, by rank; the same processes do all the jobs, one after another.

    A job that raises gives its exception's text instead, after "raised ". Jobs are found by name in their module, so they are
    plain functions of it. begun: the group is there; otherwise it is for the job to begin it, as a Trainer does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_PRELOADED)
    arguments = (world, port, dict(jobs), str(folder), begun)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=world, start_method="forkserver")
    files = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [found[name] for found in files] for name in jobs}


def _work(rank: int, world: int, port: int, jobs: dict[str, Job], folder: str, begun: bool) -> None:
    torch.set_num_threads(1)
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in said.items()} | {"ACCELERATE_USE_CPU": "true"})
    if begun:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        try:
            found[name] = job(rank, world)
        except Exception as error:
            found[name] = f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

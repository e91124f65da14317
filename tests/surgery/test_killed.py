"""Two hundred SIGKILLs at random moments: never half a model, never a damaged input, and the next try cleans up."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from surgery import Checkpoint, save_delta, whole
from surgery.record import verify
from tests.families import save_tiny

KILLS = 200
# Imports take seconds: each command is run by a fork of one process that has done them.
SERVER = """
import os, sys
import torch, transformers, accelerate, yaml
import mergekit.merge, mergekit.plan, probes.directions, surgery.edit_lists, surgery.merging
from pathlib import Path
from analyses.cli.change import apply, edit, merge
from surgery import Checkpoint, Scale, write
from surgery.checkpoint import load_module
torch.set_num_threads(1)
jobs = {
    "write": lambda here, to: write(Checkpoint(here / "tuned"), to, dtype=torch.float32),
    "apply": lambda here, to: apply(str(here / "base"), to, [f"{here}/vector:0.5"], allow_loops=True, quiet=True),
    "edit": lambda here, to: edit(str(here / "base"), to, scale=["**.mlp.down:0.5"], allow_loops=True, quiet=True),
    "merge": lambda here, to: merge(str(here / "recipe.yml"), to, allow_loops=True, quiet=True),
}
load_module(Path(sys.argv[1]) / "base", "auto")
print("up", flush=True)
for line in sys.stdin:
    job, to = line.split()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a command says is not for the test
        try:
            jobs[job](Path(sys.argv[1]), Path(to))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
RECIPE = """
merge_method: ties
base_model: {here}/base
models:
  - model: {here}/tuned
    parameters: {{weight: 1.0, density: 0.5}}
  - model: {here}/other
    parameters: {{weight: 0.5, density: 0.5}}
dtype: float32
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Three siblings, a vector and a recipe: some megabytes, so that there is something to be in the middle of."""
    here = tmp_path_factory.mktemp("killed")
    for i, name in enumerate(("base", "tuned", "other")):
        save_tiny("llama", here / name, shards=2, seed=i, dtype=torch.bfloat16)
    base = Checkpoint(here / "base")
    save_delta(Checkpoint(here / "tuned") - base, here / "vector", base_hash=base.hash())
    (here / "recipe.yml").write_text(RECIPE.format(here=here))
    return here


@pytest.fixture(scope="module")
def start(here):
    """Begins a job in a process of its own: (job, to) -> its id, and its exit code to wait for."""
    with (here / "log").open("w") as err:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    assert server.stdin
    assert server.stdout
    stdin, stdout = server.stdin, server.stdout
    assert stdout.readline() == "up\n", (here / "log").read_text()

    def start(job, to):
        print(job, to, file=stdin, flush=True)
        pid = int(stdout.readline())
        return pid, lambda: int(stdout.readline())

    yield start
    stdin.close()
    server.wait()


@pytest.mark.parametrize("job", ["write", "apply", "edit", "merge"])
def test_killed_at_random_moments(job, here, start, tmp_path):
    inputs = {
        path: path.read_bytes() for name in ("base", "tuned", "other", "vector") for path in (here / name).iterdir()
    }
    began = time.monotonic()
    _, end = start(job, tmp_path / "whole")
    assert end() == 0, (here / "log").read_text()
    takes = time.monotonic() - began
    expected = Checkpoint(tmp_path / "whole").hash()
    moments, killed = random.Random(job), 0
    for attempt in range(KILLS // 4):
        out = tmp_path / f"out{attempt}"
        pid, end = start(job, out)
        moment = moments.uniform(0, 1.1 * takes)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        caught = end() == -signal.SIGKILL
        killed += caught
        takes = max(takes, moment) if caught else min(takes, moment)  # now, whatever else the machine does
        if out.exists():
            assert Checkpoint(out).hash() == expected
            assert job == "write" or verify(out) == []
    assert killed >= KILLS // 10, f"only {killed} of {KILLS // 4} were caught at work"
    # what the dead left goes when the same output is tried again
    left = [p for p in tmp_path.glob(".out*.partial-*") if not (tmp_path / p.name[1:].split(".")[0]).exists()]
    assert left
    name = left[0].name[1:].split(".")[0]
    _, end = start(job, tmp_path / name)
    assert end() == 0
    assert not any(tmp_path.glob(f".{name}.partial-*"))
    assert Checkpoint(tmp_path / name).hash() == expected
    assert {path: path.read_bytes() for path in inputs} == inputs


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Also what a power cut would take: the names in folders, and side files, beside the weights."""
    flushed = []

    def noted(opened):
        flushed.append((Path(os.readlink(f"/proc/self/fd/{opened}")), (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    with whole.new_folder(tmp_path / "out") as partial:
        (partial / "additional_chat_templates").mkdir()
        for name in ("config.json", "additional_chat_templates/tools.jinja"):
            (partial / name).write_text("{}")
    named = {path.relative_to(partial).as_posix() for path, there in flushed if not there}
    assert named == {".", "config.json", "additional_chat_templates", "additional_chat_templates/tools.jinja"}
    assert flushed[-1] == (tmp_path, True)

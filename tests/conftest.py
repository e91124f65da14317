"""Settings for every test: one thread, because two that wait for each other are slower on small models, and jaxtyping's shapes checked."""

import gc
import os
import signal

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell in the background says so; the processes that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import jaxtyping
import pytest
import torch

import tests.shapes

torch.set_num_threads(1)
jaxtyping.jaxtyped = tests.shapes.checked
jaxtyping.install_import_hook(["surgery", "probes", "finetune", "analyses"], "tests.shapes.check")


# files of few but long tests: handed out last, as those with few tests are, one process would be left alone with them in the end
LONG = [
    "test_notebooks.py",
    "test_killed.py",
    "test_specimen.py",
    "test_cli.py",
    "test_distributed.py",
    "test_flight_recorder.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def little_to_collect():
    """Modules, tests and what else is there to stay are not looked through at each collection of garbage, which ends every training: it took a
    third of a second each time, and still a twentieth with the modules alone that a file's first training brings."""
    if len(gc.get_objects()) > 20_000:
        gc.collect()
        gc.freeze()


@pytest.fixture
def unchecked():
    """Shapes and types unchecked, so that bad input reaches the error a user without the checker sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

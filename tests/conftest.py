"""Settings for every test: one thread, because two that wait for each other are slower on small models, and jaxtyping's shapes checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(["surgery", "probes", "finetune", "analyses"], "beartype.beartype")

"""Gradients through a JVP agree between one process and two, with DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.attention_cases import interpreter_works

ROOT = Path(__file__).parents[2]
OLD = torch.__version__ < (2, 13)


@pytest.mark.skipif(not interpreter_works(), reason="the interpreter of this triton needs numpy < 2.4")
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """FSDP2 too, in which a JVP needs PyTorch 2.13."""
    kinds = ["ddp", "ddp-inside", *([] if OLD else ["fsdp"])]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",  # on the CPU, with gloo, also where there is a GPU
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # as a module: beside the script lies a folder that is called jvp_attention as well
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_attention", str(tmp_path / "store"), *kinds]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert run.stdout.split() == ["equal", *kinds], run.stderr[-2000:]

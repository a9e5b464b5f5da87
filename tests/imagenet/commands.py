"""The training command in small, what its runs are compared by, and processes that nobody waits for without end."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from imagenet import train
from imagenet.training.checkpoint import read_checkpoint
from imagenet.training.step import Training
from imagenet.weights import checkpoints
from tests.processes import python

LIMIT = 300  # seconds that a process may take
SMALL = [
    "--hidden-size", "16", "--depth", "1", "--heads", "2", "--batch-size", "8", "--lr", "1e-3", "--clip", "1",
    "--schedule", "cosine", "--w", "1", "--ema", "0.99", "--precision", "float32", "--attention", "plain",
    "--log-every", "5", "--save-every", "1000",
]  # fmt: skip
TINY = ["synthetic", "--patch-size", "16", *SMALL]
ON_LATENTS = ["imagenet256-w1.75", "--patch-size", "4", *SMALL]


def command(folder, *options, base=TINY):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train.main([*base, "--out", str(folder), *map(str, options)])
    finally:
        torch.set_num_threads(threads)


def stop_at(step, folder, *options, how=signal.SIGTERM, base=TINY):
    """Run the command, which gets a signal after a step; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train_step", stopping_at(Training.train_step, step, how))
        return command(folder, *options, base=base)


def torchrun(*arguments):
    """Run a script, or -m and a module, in two processes; returns status, stdout and stderr."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments, limit=LIMIT)


def ended(process):
    """The exit status of a multiprocessing.Process, or that of the SIGKILL which it gets after LIMIT."""
    process.join(LIMIT)
    process.kill()
    process.join()
    return process.exitcode


def status(main, *arguments, **keywords):
    """The exit status of a command, however it ends."""
    try:
        return main(*arguments, **keywords)
    except SystemExit as stop:
        return stop.code


def weights(folder):
    return load_file(folder / "weights.safetensors")


def losses(folder):
    lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [(line["step"], line["jump"], line["flow_matching"], line["gradient_norm"], line["lr"]) for line in lines]


def same(a, b):
    """Tell whether two states are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(path):
    return {k: v for k, v in read_checkpoint(path).items() if k != "seconds"}


def assert_same_run(a, b):
    assert same(weights(a), weights(b))
    assert losses(a) == losses(b)
    newest = [checkpoints(folder)[-1] for folder in (a, b)]
    assert newest[0].name == newest[1].name
    assert same(state(newest[0]), state(newest[1]))


def stopping_at(train_step, step, how=signal.SIGTERM):
    """A train_step after whose `step`th call the process gets a signal."""

    def stopping(self, *arguments, **keywords):
        metrics = train_step(self, *arguments, **keywords)
        if self.step == step:
            signal.raise_signal(how)
        return metrics

    return stopping

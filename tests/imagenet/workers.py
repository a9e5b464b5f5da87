"""Functions that tests run in processes of their own."""

import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imagenet.config import Config
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.model import distributed, parallelize
from imagenet.training.checkpoint import Saver, read_checkpoint
from imagenet.training.step import Training

SMALL = Config(hidden_size=16, depth=2, batch_size=12, steps=50, w=2.0, warmup=3, optimizer="adamw", lr=1e-3)


def fsdp_works() -> bool:
    """Tell whether this PyTorch has an FSDP whose JVP is right."""
    try:
        parallelize.check_version()
    except ValueError:
        return False
    return True


needs_fsdp = pytest.mark.skipif(not fsdp_works(), reason="a JVP under FSDP is wrong before PyTorch 2.13")


def randomise(module, seed=0):
    """Random numbers where a new network has zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5)
    return module


def full_state(state):
    """Every tensor of a state, unsharded, on the CPU."""
    if isinstance(state, Mapping):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [full_state(value) for value in state]
    return parallelize.full_tensor(state).detach().cpu() if isinstance(state, torch.Tensor) else state


def start_state(config):
    """The state of a training that is not at its zero start."""
    training = Training(config, distributed.World())
    for module, seed in ((training.model, 0), (training.target.module, 1), (training.ema.module, 2)):
        randomise(module, seed)
    return full_state(training.state_dict())


def steps(world, count=3, poison=None, **fields):
    """Train from start_state: losses and gradient norm of each step, the last gradients, and the state at the end."""
    plain = replace(SMALL, **{**fields, "parallel": "ddp", "accumulate": 1})
    training = Training(replace(plain, **fields), world)
    training.load_state_dict(parallelize.reshard(start_state(plain), training.state_dict()))
    batches = Batches(training.config, load_data(training.config), world.rank, world.size)
    metrics = []
    for step in range(count):
        batch = batches[step]
        if poison == (step, world.rank):
            batch.x0[1] = float("nan")
        result = training.train_step(batch)
        metrics.append([*result.losses, result.gradient_norm])
    gradients = full_state({name: p.grad for name, p in training.model.named_parameters()})
    return {"metrics": metrics, "gradients": gradients, "state": full_state(training.state_dict())}


def main(folder):
    """Under torchrun: every way of training together, results of rank 0 saved in `folder`."""
    torch.set_num_threads(1)
    with distributed.process_group("cpu") as world:
        train_in_every_way(folder, world)


def train_in_every_way(folder, world):
    kinds = ("ddp", "fsdp") if fsdp_works() else ("ddp",)
    results = {}
    for kind in kinds:
        results |= {
            kind: steps(world, parallel=kind),
            f"{kind}, two micro-batches": steps(world, parallel=kind, accumulate=2),
            f"{kind}, checkpointing": steps(world, parallel=kind, checkpointing=True),
        }
    for kind in kinds:
        results[f"saved by {kind}"] = save_and_reshard(folder / kind, kind, world)
    save_to_a_full_disk(folder / "ddp", world)
    results["any"] = world.any(world.first, not world.first, False)
    try:
        steps(world, poison=(1, 1))
    except FloatingPointError as error:
        (folder / f"nan-{world.rank}.txt").write_text(str(error))
    try:
        world.raise_on_all_ranks(OSError("no space") if world.first else None)
    except OSError as error:
        (folder / f"raised-{world.rank}.txt").write_text(str(error))
    if world.first:
        torch.save(results, folder / "results.pt")


def save_and_reshard(folder, kind, world):
    """Save a state while the next step is taken; returns it, and what the other way of training makes of it."""
    training = Training(replace(SMALL, parallel=kind), world)
    training.load_state_dict(parallelize.reshard(start_state(SMALL), training.state_dict()))
    batches = Batches(training.config, load_data(training.config), world.rank, world.size)
    training.train_step(batches[0])
    saved = copy.deepcopy(full_state(training.state_dict()))
    with Saver(folder, 3, world, asynchronous=True) as saver:
        saver.save(training.state_dict(), training.step)
        training.train_step(batches[1])
    other = Training(replace(SMALL, parallel="fsdp" if kind == "ddp" and fsdp_works() else "ddp"), world)
    other.load_state_dict(read_checkpoint(folder / "checkpoints" / "00000001", other.slot))
    return {"saved": saved, "read": full_state(other.state_dict())}


def save_to_a_full_disk(folder, world):
    """Let the second process alone find no space; what each says goes into a file."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save = torch.save
    if not world.first:
        torch.save = full
    try:
        with Saver(folder, 3, world) as saver:
            saver.save({"a": torch.ones(9), "b": torch.ones(9)}, 2)
    except OSError as error:
        (folder.parent / f"full-{world.rank}.txt").write_text(str(error))
    torch.save = save


def short_of_space(arguments, size):
    """The command where no file may grow beyond `size` bytes, as on a full disk; its messages go to stderr.txt."""
    import contextlib
    import resource
    import traceback

    from imagenet import train

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    with open("stderr.txt", "w") as file, contextlib.redirect_stderr(file):
        try:
            sys.exit(train.main(arguments))
        except OSError:
            traceback.print_exc()
            sys.exit(1)


def quiet(arguments):
    """The command, one thread, without its progress."""
    import contextlib

    from imagenet import train

    torch.set_num_threads(1)
    with open(os.devnull, "w") as file, contextlib.redirect_stdout(file):
        sys.exit(train.main(arguments))


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))

"""Two processes against one: the same losses, gradients, weights; NaN and failure stop both."""

import pytest
import torch
from torch import distributed

from imagenet.model.distributed import World, process_group
from imagenet.model.parallelize import check_version
from imagenet.training.checkpoint import read_checkpoint
from imagenet.weights import checkpoints
from tests.imagenet.commands import same, torchrun
from tests.imagenet.workers import needs_fsdp, steps
from tests.processes import ROOT
from tvm_ref.cli.errors import UserError

ALONE = World()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(ROOT / "tests" / "imagenet" / "workers.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone():
    return steps(ALONE)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(f"{kind}{way}", marks=[needs_fsdp] if kind == "fsdp" else [])
        for kind in ("ddp", "fsdp")
        for way in ("", ", two micro-batches", ", checkpointing")
    ],
)
@pytest.mark.slow
def test_two_processes_are_one(together, alone, kind):
    result = together[1][kind]
    for a, b in zip(result["metrics"], alone["metrics"], strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=1e-5)
    for part in ("model", "target", "ema"):
        states = (r["state"][part] for r in (result, alone))
        mine, theirs = (s.get("module", s) for s in states)
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=3e-5)
    assert result["state"]["optimizer"]["state"].keys() == alone["state"]["optimizer"]["state"].keys()


@pytest.mark.slow
def test_nan_on_one_rank_stops_both_with_its_name(together):
    texts = {(together[0] / f"nan-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(texts) == 1
    assert "step 1: the jump loss is NaN or infinite on rank 1" in texts.pop()


@pytest.mark.slow
def test_flags_and_failures_are_every_ones(together):
    folder, results = together
    assert results["any"] == [True, True, False]
    assert {(folder / f"raised-{rank}.txt").read_text() for rank in (0, 1)} == {"no space"}


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
@pytest.mark.slow
def test_each_process_writes_its_part_and_any_number_reads_it(together, kind):
    """Weights, averages and moments, bit for bit: by two processes that train the other way, and by one alone."""
    folder, results = together
    path = checkpoints(folder / kind)[-1]
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.2 * min(sizes)
    saved, read = (results[f"saved by {kind}"][a] for a in ("saved", "read"))
    assert same(read, saved)
    assert same(read_checkpoint(path), saved)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_is_so_for_all_and_loses_nothing(together):
    folder, _ = together
    texts = {(folder / f"full-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(texts) == 1
    assert "the checkpoint of step 2 could not be written: No space left on device" in texts.pop()
    assert [path.name for path in (folder / "ddp" / "checkpoints").iterdir()] == ["00000001"]


@needs_fsdp
def test_fsdp_alone_is_plain_training(alone):
    with process_group("cpu") as world:
        result = steps(world, parallel="fsdp")
    assert not torch.distributed.is_initialized()
    assert result["metrics"][0][:3] == pytest.approx(alone["metrics"][0][:3], rel=1e-6)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_bug_of_the_first_keeps_its_traceback():
    with pytest.raises(KeyError) as error:
        World().on_first(lambda: {}["absent"])
    assert "absent" in str(error.traceback[-1].statement)


def test_fsdp_is_refused_where_its_jvp_would_be_wrong(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(ValueError, match=r"2\.13"):
        check_version()
    for version in ("2.13.0", "2.15.0.dev20261001+cu130", "3.0.0a0"):
        monkeypatch.setattr(torch, "__version__", version)
        check_version()


def test_cuda_is_the_gpu_of_this_process(monkeypatch):
    """PyTorch refuses to make "cuda" the current device, in a traceback."""
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(UserError, match="--device cuda:99 cannot be used here"), process_group("cuda"):
        pass


def test_processes_are_left_however_it_ends(monkeypatch):
    """Also where joining fails half-way; what was once not left kept others waiting."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: calls.append("joined"))
    monkeypatch.setattr(distributed, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(distributed, "new_group", lambda **_: "group")
    with pytest.raises(KeyError), process_group("cpu"):
        raise KeyError
    monkeypatch.setattr(distributed, "new_group", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError), process_group("cpu"):
        pass
    assert calls == ["joined", "left"] * 2


def test_every_command_joins_processes_in_one_way():
    """By process_group, which leaves them: evaluate.py and benchmark.py once joined on their own and never left."""
    joining = {p.name for p in (ROOT / "imagenet").rglob("*.py") if "init_process_group" in p.read_text()}
    assert joining == {"distributed.py", "parallelize.py"}

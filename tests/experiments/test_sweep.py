"""Many trainings: their order, and what diverged."""

import sys
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType

import pytest

from tvm_ref.cli.progress import progress
from tvm_ref.experiments import sweep
from tvm_ref.toy.config import ToyConfig

TINY = ToyConfig(batch_size=4, width=4, depth=1, steps=2)


def first_figure(training, reference):
    """Import by name is what workers need."""
    return {"step": float(training.step), "seed": float(training.config.seed)}


@pytest.mark.slow
def test_two_processes_give_what_one_gives_in_order():
    configs = [ToyConfig(batch_size=4, width=4, depth=1, steps=steps, seed=steps) for steps in (30, 1, 2)]
    results = []
    for jobs in (1, 2):
        with progress(total=33) as bar:
            results.append(list(sweep.train_many(configs, first_figure, jobs=jobs, points=10, bar=bar)))
        assert bar.n == bar.total == 33
    one, two = results
    assert one == two
    assert [result["figures"]["seed"] for result in one] == [30, 1, 2]


@pytest.mark.slow
def test_a_measure_that_processes_cannot_import_is_an_error_and_no_endless_wait(monkeypatch):
    module = ModuleType("only_here")
    exec("def measure(training, reference): return {}", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(BrokenProcessPool):
        list(sweep.train_many([TINY], module.measure, jobs=2, points=10, bar=progress(total=2)))


def test_a_training_that_diverges_is_marked_and_kept_and_the_bar_ends_at_the_number_of_steps(
    monkeypatch, capsys, tmp_path
):
    def diverge(training):
        raise FloatingPointError("diverged")

    monkeypatch.setattr(sweep.Training, "train_step", diverge)
    for total in (2, 0):  # what was kept is not trained again
        with progress(total=2) as bar:
            (result,) = sweep.train_many([TINY], first_figure, jobs=1, points=10, bar=bar, keep=tmp_path)
        assert (result["diverged"], result["figures"]) == (True, {})
        assert bar.n == bar.total == total
    assert "1 of 1 trainings" in capsys.readouterr().err

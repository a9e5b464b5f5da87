"""Many trainings: their order, and what diverged."""

import pytest

from tvm_ref.experiments import sweep
from tvm_ref.toy.config import ToyConfig

TINY = ToyConfig(batch_size=4, width=4, depth=1, steps=2)


def first_figure(training, reference):
    """Import by name is what workers need."""
    return {"step": float(training.step), "seed": float(training.config.seed)}


@pytest.mark.slow
def test_two_processes_give_what_one_gives_in_order():
    configs = [ToyConfig(batch_size=4, width=4, depth=1, steps=steps, seed=steps) for steps in (30, 1, 2)]
    one, two = (list(sweep.train_many(configs, first_figure, jobs=jobs, points=10, label="")) for jobs in (1, 2))
    assert one == two
    assert [result["figures"]["seed"] for result in one] == [30, 1, 2]


def test_a_training_that_diverges_is_marked_and_the_bar_ends_at_the_number_of_trainings(monkeypatch, capsys):
    def diverge(training):
        raise FloatingPointError("diverged")

    monkeypatch.setattr(sweep.Training, "train_step", diverge)
    (result,) = sweep.train_many([TINY], first_figure, jobs=1, points=10, label="training")
    assert result["diverged"]
    assert result["figures"] == {}
    assert "training: 100%" in capsys.readouterr().err

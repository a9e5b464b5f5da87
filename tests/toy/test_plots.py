"""Pictures are figures, to be saved or shown in a notebook; the exact flow, drawn as a model, coincides with itself."""

import numpy as np
import pytest
import torch

from tvm_ref.bound.chain import TERMS, measure
from tvm_ref.bound.plots import plot_bound
from tvm_ref.toy import plots
from tvm_ref.toy.distributions import make_distribution
from tvm_ref.toy.metrics import make_reference


@pytest.fixture(scope="module")
def oracle():
    return make_distribution("moons")


@pytest.fixture(scope="module")
def reference(oracle):
    return make_reference(oracle, points=60)


def test_samples_have_a_panel_for_data_and_each_nfe(oracle, reference):
    figure = plots.plot_samples(oracle, oracle.jump, reference, nfes=(1, 2), points=20)
    assert [ax.get_title() for ax in figure.axes] == ["data", "model, 1 step", "model, 2 steps"]
    one, two = (ax.collections[0].get_offsets() for ax in figure.axes[1:])
    np.testing.assert_allclose(one, two, atol=1e-3)  # the exact map does not care in how many steps


def test_trajectories_of_the_exact_flow_drawn_as_a_model_are_those_of_the_exact_flow(oracle, reference):
    exact, model = plots.plot_trajectories(oracle, oracle.jump, reference).axes
    assert len(exact.lines) == len(model.lines) > 0
    for a, b in zip(exact.lines, model.lines, strict=True):
        np.testing.assert_allclose(a.get_xydata(), b.get_xydata(), atol=1e-3)  # pictures take larger steps


def test_the_map_of_the_exact_flow_drawn_as_a_model_is_the_exact_map(oracle, reference):
    _, exact, model = plots.plot_map(oracle, oracle.jump, reference).axes
    for a, b in zip(exact.lines, model.lines, strict=True):
        np.testing.assert_allclose(a.get_xydata(), b.get_xydata(), atol=1e-3)


def test_losses_show_the_term_that_is_trained_and_the_minimum():
    log = [{"step": i, "jump": 0.0, "flow_matching": 2.0 - i / 10} for i in range(1, 9)]
    (ax,) = plots.plot_losses(log, minimum=1.5).axes
    trained, minimum = ax.lines
    np.testing.assert_allclose(trained.get_xydata(), [(i, 2 - i / 10) for i in range(1, 9)])
    assert set(minimum.get_ydata()) == {1.5}


def test_the_bound_is_drawn_term_by_term(oracle, tmp_path):
    x0, x1 = torch.randn(2, 20, 2, dtype=torch.float64)
    bound = measure(oracle, oracle, x0, x1, scale=0.07, steps=8)
    figure = plot_bound(bound, "moons")
    bars = [bar.get_width() for bar in figure.axes[2].patches]
    assert bars[::-1] == [bound.values[name] for name in TERMS]
    plots.save_figure(figure, tmp_path / "bound.png")
    assert (tmp_path / "bound.png").stat().st_size > 0

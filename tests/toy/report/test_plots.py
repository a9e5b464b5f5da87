"""Pictures are figures, to be saved or shown in a notebook; the exact flow, drawn as a model, coincides with itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tvm_ref.bound.chain import TERMS, measure
from tvm_ref.bound.paths import Draws, time_grid
from tvm_ref.bound.plots import plot_bound
from tvm_ref.guidance import Condition
from tvm_ref.sampling import EulerStep
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.points import OwnPoints
from tvm_ref.toy.report import plots
from tvm_ref.toy.report.map_plot import plot_map
from tvm_ref.toy.report.metrics import make_reference


@pytest.fixture(scope="module")
def oracle():
    return make_distribution("moons")


@pytest.fixture(scope="module")
def reference(oracle):
    return make_reference(oracle, points=60)


def distance_to_line(x, line):
    """Measure how far points x [N, 2] are from a line through points [M, 2]: [N]."""
    begin, piece = line[:-1], line.diff(dim=0)
    along = ((x[:, None] - begin) * piece).sum(-1) / piece.square().sum(-1)  # [N, M - 1]
    return (x[:, None] - begin - along.clamp(0, 1)[..., None] * piece).norm(dim=-1).amin(1)


def offsets(ax):
    return ax.collections[0].get_offsets()


def test_samples_have_a_panel_for_noise_data_and_each_nfe(oracle, reference):
    figure = plots.plot_samples(oracle, oracle.jump, reference, nfes=(1, 2), points=20)
    assert [ax.get_title() for ax in figure.axes] == ["noise", "data", "model, 1 step", "model, 2 steps"]
    one, two = (offsets(ax) for ax in figure.axes[2:])
    np.testing.assert_allclose(one, two, atol=1e-3)  # the exact map does not care in how many steps
    exact = oracle.jump(torch.tensor(offsets(figure.axes[0])), torch.ones(20), torch.zeros(20))
    np.testing.assert_allclose(one, exact, atol=1e-5)


@pytest.mark.slow
def test_guided_classes_are_those_of_the_exact_flow_in_colour(oracle):
    guided = make_reference(oracle, w=2.0, points=20)
    exact, model = plots.plot_samples(oracle, oracle.jump, guided, nfes=(1,), points=20).axes[1:]
    np.testing.assert_allclose(offsets(exact), offsets(model), atol=1e-4)
    assert len({tuple(colour) for colour in model.collections[0].get_facecolors()}) == 2


@pytest.mark.slow
def test_own_points_are_drawn_as_they_are_in_their_own_units():
    points = torch.randn(30, 2, dtype=torch.float64) * torch.tensor([1.0, 500.0]) + 70
    oracle = OwnPoints(points, 0.1, ("height", "weight"))
    reference = make_reference(oracle, points=20)
    noise, own, model = plots.plot_samples(oracle, oracle.jump, reference, nfes=(1,), points=40).axes
    assert own.get_title() == "your 30 points"
    np.testing.assert_allclose(offsets(own), points, rtol=1e-9)
    exact = oracle.jump(torch.tensor(offsets(noise)), torch.ones(40), torch.zeros(40))
    np.testing.assert_allclose(offsets(model), oracle.units.restore(exact), rtol=1e-4)
    assert (own.get_xlabel(), own.get_ylabel()) == ("height", "weight")
    assert own.get_ylim()[1] > 500
    _, path = plots.plot_trajectories(oracle, oracle.jump, reference).axes
    np.testing.assert_allclose(
        path.collections[-1].get_offsets()[0], oracle.units.restore(reference.exact)[0], rtol=1e-3
    )
    _, exact, carried = plot_map(oracle, oracle.jump, reference).axes
    for lines in zip(exact.lines, carried.lines, strict=True):
        a, b = (oracle.units.standardise(torch.tensor(line.get_xydata())) for line in lines)
        assert distance_to_line(a, b).max() < 1e-3
    assert all(ax.get_ylabel() == "weight" for ax in (path, exact, carried))


def test_the_window_holds_guided_data_and_leaves_outliers_out():
    near, wide = torch.zeros(1000, 2), 4 * torch.ones(1000, 2)
    near[0] = 1e4
    for cloud, extent in ((near, plots.EXTENT), (wide, 4.2)):
        axes = plots.make_figure(1)[1]
        plots.set_window(axes, cloud)
        assert axes[0].get_xlim() == pytest.approx((-extent, extent))


def test_flow_matching_is_shown_in_the_steps_that_it_needs(oracle, reference):
    """One Euler step carries all noise to one point, and its pictures once were blank."""
    euler = EulerStep(oracle)
    samples = plots.plot_samples(oracle, euler, reference, points=20)
    assert [ax.get_title() for ax in samples.axes[2:]] == [
        "model, 1 Euler step", "model, 8 Euler steps", "model, 64 Euler steps"
    ]  # fmt: skip
    assert offsets(samples.axes[2]).std(0).max() < 1e-3
    _, exact, model = plot_map(oracle, euler, reference).axes
    assert model.get_title() == "carried by the model, 64 Euler steps"
    spread = [np.concatenate([line.get_xydata() for line in ax.lines]).std(0) for ax in (exact, model)]
    np.testing.assert_allclose(*spread, rtol=0.1)
    _, path = plots.plot_trajectories(oracle, euler, reference).axes
    assert path.get_title() == "model: 64 Euler steps"


def test_trajectories_of_the_exact_flow_drawn_as_a_model_are_those_of_the_exact_flow(oracle, reference):
    exact, model = plots.plot_trajectories(oracle, oracle.jump, reference).axes
    assert len(exact.lines) == len(model.lines) > 0
    for a, b in zip(exact.lines, model.lines, strict=True):
        np.testing.assert_allclose(a.get_xydata(), b.get_xydata(), atol=1e-3)  # pictures take larger steps
    ends, exact_ends = (c.get_offsets() for c in model.collections[-2:])
    np.testing.assert_allclose(ends, exact_ends, atol=1e-3)


@pytest.mark.slow
def test_what_lies_below_a_guided_map_is_the_exact_guided_flow_of_its_class(oracle, reference):
    """It once was called data, and was of both classes."""
    guided = replace(reference, condition=Condition(torch.arange(60) % 2, torch.full((60,), 0.5, dtype=torch.float64)))
    figure = plot_map(oracle, lambda x, t, s, c: x, guided)
    assert "grey: samples of the exact flow, w = 2, class 0." in figure.get_supxlabel()
    np.testing.assert_array_equal(offsets(figure.axes[1]), reference.data[::2])
    _, path = plots.plot_trajectories(oracle, lambda x, t, s, c: x, guided).axes
    assert path.collections[0].get_label() == "samples of the exact flow, w = 2"


@pytest.mark.slow
def test_the_map_of_the_exact_flow_drawn_as_a_model_is_the_exact_map(oracle, reference):
    _, exact, model = plot_map(oracle, oracle.jump, reference).axes
    for lines in zip(exact.lines, model.lines, strict=True):
        a, b = (torch.tensor(line.get_xydata()) for line in lines)
        assert distance_to_line(a, b).max() < 1e-3
        assert distance_to_line(b, a).max() < 1e-3


def test_losses_show_the_term_that_is_trained_and_the_minimum():
    log = [{"step": i, "jump": 0.0, "flow_matching": 2.0 - i / 10} for i in range(1, 9)]
    (ax,) = plots.plot_losses(log, least=1.5).axes
    trained, minimum = ax.lines
    np.testing.assert_allclose(trained.get_xydata(), [(i, 2 - i / 10) for i in range(1, 9)])
    assert set(minimum.get_ydata()) == {1.5}
    assert len(plots.plot_losses(log).axes[0].lines) == 1


@pytest.mark.slow
def test_the_bound_is_drawn_term_by_term(oracle, tmp_path):
    x0, x1 = torch.randn(2, 20, 2, dtype=torch.float64)
    bound = measure(oracle, oracle, Draws(x0, x1), time_grid(1.0, 0.07, 8), 0.07)
    figure = plot_bound(bound, "moons")
    dots = figure.axes[2].collections[-1].get_offsets()[:, 0].tolist()
    assert dots == sorted((bound.values[name] for name in TERMS), reverse=True)  # upwards: the smallest is on top
    assert all(ax.get_xlim() == (1, 0) for ax in figure.axes[:2])  # from noise to data
    plots.save_figure(figure, tmp_path / "bound.png")
    assert {"\N{MINUS SIGN}1", "0", "1", "10"} <= {text.get_text() for text in figure.axes[1].get_yticklabels()}
    assert (tmp_path / "bound.png").stat().st_size > 0

"""Who equals whom in the family: sample by sample where that holds, else in expectation, by enumeration."""

import itertools

import pytest
import torch

from tests.networks import Waves, some_times
from tests.objectives.exact import TwoPoints
from tests.objectives.samples import B, gradient, per_sample, setup
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import (
    ESD,
    LSD,
    OBJECTIVES,
    PSD,
    TVM,
    AlphaFlow,
    ContinuousConsistency,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    ResidualObjective,
    Shortcut,
    SoFlow,
    mean_square,
)
from tvm_ref.time_samplers import Times, TimeSampler

UNWEIGHTED = {  # one-residual objectives without weights
    "lsd": (LSD, {}),
    "esd": (ESD, {}),
    "meanflow": (MeanFlow, {"power": 0}),
    "imf": (ImprovedMeanFlow, {"power": 0}),
    "sct": (ContinuousConsistency, {}),
    "alphaflow": (AlphaFlow, {"power": 0, "alpha": 0.3}),
    "soflow": (SoFlow, {"power": 0}),
    "psd": (PSD, {"split": "uniform"}),
    "shortcut": (Shortcut, {}),
}


@pytest.mark.parametrize("shape", [(B, 2), (B, 3, 2, 2)])
def test_the_jump_term_of_tvm_is_lsd_sample_by_sample(shape):
    """Without guidance, with an EMA target and a stopped landing point: TVM's first term is that of 2505.18825."""
    model, target, x0, x1, times = setup(shape)
    tvm, lsd = (kind(model)(x0, x1, times, target=target) for kind in (TVM, LSD))
    torch.testing.assert_close(tvm.jump, lsd.jump, rtol=1e-12, atol=0)
    torch.testing.assert_close(per_sample(tvm.jump, model), per_sample(lsd.jump, model), rtol=1e-11, atol=1e-13)


def test_equation_9_is_lsd_with_nothing_stopped():
    model, _, x0, x1, times = setup()
    tvm, lsd = TVM(model, detach_landing=False)(x0, x1, times), LSD(model, stops="none")(x0, x1, times)
    torch.testing.assert_close(per_sample(tvm.jump, model), per_sample(lsd.jump, model), rtol=1e-11, atol=1e-13)


def test_the_whole_of_tvm_is_lsd_on_the_jumps_and_on_the_diagonal():
    """With s' = s both terms: TVM of n samples is LSD of 2 n, half of them on the diagonal at x_s."""
    model, target, x0, x1, (t, s, _) = setup()
    tvm = TVM(model)(x0, x1, Times(t, s, s), target=target)
    both = Times(torch.cat([t, s]), torch.cat([s, s]), torch.cat([s, s]))
    lsd = LSD(model)(torch.cat([x0, x0]), torch.cat([x1, x1]), both, target=target)
    torch.testing.assert_close(tvm.jump.sum() + tvm.flow_matching.sum(), lsd.total.sum())
    torch.testing.assert_close(gradient(tvm.total.sum(), model), gradient(lsd.total.sum(), model))


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_on_the_diagonal_every_residual_is_flow_matching(name):
    kind, options = UNWEIGHTED[name]
    model, target, x0, x1, (t, _, _) = setup()
    ours = kind(model, **options)(x0, x1, Times(t, t, t), target=target)
    fm = FlowMatching(model)(x0, x1, Times(t, t, t), target=target)
    assert not bool((ours.flow_matching if kind.one_term else ours.jump).any())
    if kind is not ContinuousConsistency:  # its value is that of its tangent, its gradient that of the rest
        torch.testing.assert_close(ours.total, fm.total)
    torch.testing.assert_close(per_sample(ours.total, model), per_sample(fm.total, model))


def test_the_expected_gradient_of_mean_flow_is_that_of_stopped_esd_with_the_exact_velocity():
    """Given x_t, v is one of two velocities; MeanFlow's target is linear in v, so the mean over both is ESD's at u."""
    data = TwoPoints(torch.tensor([[-1.0, 0.3], [0.8, -0.5]]), (0.7, 0.3))
    model = FlowMap(Waves())
    x, t, s = torch.randn(B, 2, dtype=torch.float64), *some_times(B)
    t = 0.05 + 0.95 * t

    class Exact(FlowMap):  # the exact velocity as the target of ESD
        def velocity(self, x, t, condition=None):
            return data.velocity(x, t)

    expected = torch.zeros(B, 3, dtype=torch.float64)
    for k in range(2):
        x0 = data.points[k].expand(B, 2)
        x1 = (x - (1 - t[:, None]) * x0) / t[:, None]
        terms = MeanFlow(model, power=0)(x0, x1, Times(t, s, s))
        expected += data.posterior(x, t)[:, k, None] * per_sample(terms.jump, model)
    esd = ESD(model, stops="all")(x, x, Times(t, s, s), target=Exact(Waves()))  # x0 = x1 = x: x_t = x
    torch.testing.assert_close(per_sample(esd.jump, model), expected, rtol=1e-9, atol=1e-11)


def test_continuous_consistency_without_normalisation_is_mean_flow_at_zero():
    model, _, x0, x1, times = setup()
    sct = ContinuousConsistency(model, constant=None)(x0, x1, times)
    mean_flow = MeanFlow(model, power=0)(x0, x1, times._replace(s=torch.zeros_like(times.s)))
    torch.testing.assert_close(per_sample(sct.jump, model), per_sample(mean_flow.jump, model))


def test_alpha_flow_at_one_is_trajectory_flow_matching():
    model, _, x0, x1, times = setup()
    alpha = AlphaFlow(model, alpha=1.0, power=0)(x0, x1, times)
    by_hand = mean_square(model.network(interpolate(x0, x1, times.t), times.t, times.s) - (x1 - x0))
    torch.testing.assert_close(per_sample(alpha.jump, model), per_sample(by_hand, model))


def test_alpha_flow_at_one_half_is_a_shortcut_whose_first_half_is_v():
    model, _, x0, x1, times = setup()
    t, s, _ = times
    x, v, r = interpolate(x0, x1, t), x1 - x0, (t + s) / 2
    average = (v + model.network(x - (t - r)[:, None] * v, r, s)).detach() / 2
    by_hand = 2 * mean_square(model.network(x, t, s) - average)
    alpha = AlphaFlow(model, alpha=0.5, power=0)(x0, x1, times)
    torch.testing.assert_close(per_sample(alpha.jump, model), per_sample(by_hand, model))


@pytest.mark.parametrize("power", [0, 1])
def test_alpha_flow_tends_to_mean_flow(power):
    """At alpha = 0 it is MeanFlow; towards it, the gradients' difference falls as alpha, if eps falls as alpha^2."""
    model, _, x0, x1, times = setup()

    def alpha_flow(alpha, eps):
        return per_sample(AlphaFlow(model, alpha=alpha, power=power, eps=eps)(x0, x1, times).total, model)

    mean_flow = per_sample(MeanFlow(model, power=power)(x0, x1, times).total, model)
    torch.testing.assert_close(alpha_flow(0.0, 1e-3), mean_flow)
    differences = [float((alpha_flow(a, 1e-3 * a**2) - mean_flow).norm()) for a in (1e-2, 1e-3, 1e-4)]
    for coarse, fine in itertools.pairwise(differences):
        assert coarse / fine == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("alpha", [0.3, 0.01])
def test_soflow_has_the_gradient_of_alpha_flow(alpha):
    """||X(x_t, t, s) - sg X(x_l, l, s)||^2 / ((t - l)(t - s)) is alpha-Flow's loss, alpha = (t - l) / (t - s)."""
    model, _, x0, x1, times = setup()
    t, s, _ = times
    soflow = SoFlow(model, first=alpha, last=alpha, power=0)(x0, x1, times)
    alpha_flow = AlphaFlow(model, alpha=alpha, power=0)(x0, x1, times)
    torch.testing.assert_close(per_sample(soflow.jump, model), per_sample(alpha_flow.jump, model))
    x, v, l = interpolate(x0, x1, t), x1 - x0, t - alpha * (t - s)  # noqa: E741
    distance = model.jump(x, t, s) - model.jump(x + (l - t)[:, None] * v, l, s).detach()
    by_hand = mean_square(distance) / ((t - l) * (t - s))
    torch.testing.assert_close(per_sample(soflow.jump, model), per_sample(by_hand, model))


def test_psd_is_the_distance_between_one_jump_and_two():
    model, target, x0, x1, times = setup()
    t, s, h = times.t, times.s, times.s_prime
    for split, share in (("uniform", h), ("midpoint", torch.full_like(h, 0.5))):
        x, r = interpolate(x0, x1, t), s + share * (t - s)
        two = target.jump(target.jump(x, t, r), r, s)
        by_hand = mean_square(model.jump(x, t, s) - two) / (t - s) ** 2
        psd = PSD(model, split=split)(x0, x1, times, target=target)
        torch.testing.assert_close(per_sample(psd.jump, model), per_sample(by_hand, model))


def test_shortcut_is_psd_down_to_its_shortest_jumps_where_velocities_take_over():
    model, target, x0, x1, _ = setup((64, 2))
    times = Times(*(a.double() for a in TimeSampler("dyadic").draw(64, torch.Generator().manual_seed(0))))
    shortcut, psd = (kind(model)(x0, x1, times, target=target).jump for kind in (Shortcut, PSD))
    t, s = times.t, times.s
    shortest = t - s <= 2 / 128
    assert 0 < int(shortest.sum()) < 64
    torch.testing.assert_close(shortcut[~shortest], psd[~shortest])
    x, r = interpolate(x0, x1, t), (t + s) / 2
    first = target.velocity(x, t)
    second = target.velocity(x - (t - r)[:, None] * first, r)
    by_hand = mean_square(model.network(x, t, s) - (first + second) / 2)
    torch.testing.assert_close(shortcut[shortest], by_hand[shortest])


def test_the_laws_of_times_give_every_method_what_it_needs():
    for name, kind in OBJECTIVES.items():
        times = kind.default_times.draw(4000, torch.Generator().manual_seed(0))
        share = float((times.t == times.s).float().mean())
        assert abs(share - kind.default_times.equal_share) < 0.03
        if issubclass(kind, ResidualObjective) and kind is not ContinuousConsistency:
            assert share > 0.2, f"{name} would never see the data's velocity"


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_methods_that_meet_the_data_at_equal_times_alone_need_such_times(kind):
    """For s < t their loss does not change with v = x1 - x0 as long as x_t stays; all others' does."""
    model, target, x0, x1, times = setup()
    t, change = times.t[:, None], 0.1

    def jumps(x0, x1):
        return kind(model)(x0, x1, times, target=target).total[times.s < times.t].detach()

    moved = jumps(x0 + t * change, x1 - (1 - t) * change)
    assert torch.allclose(jumps(x0, x1), moved, rtol=1e-9) == kind.needs_equal_times
    kind.make_times(TimeSampler("clamp"), 0.0)  # draws t = s by itself
    if kind.needs_equal_times:
        with pytest.raises(ValueError, match="equal_share must be above 0"):
            kind.make_times(TimeSampler(), 0.0)
    else:
        assert kind.make_times(TimeSampler(), 0.0) == TimeSampler("gap*")


@pytest.mark.parametrize("kind", [a for a in OBJECTIVES.values() if not a.has_guidance])
def test_methods_without_guidance_refuse_a_null_label(kind):
    with pytest.raises(ValueError, match="no guidance"):
        kind(FlowMap(Waves()), null_label=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: LSD(m, stops="full"), "convex, none"),
        (lambda m: PSD(m, split="thirds"), "midpoint, uniform"),
        (lambda m: AlphaFlow(m, alpha=1.5), "alpha must lie"),
        (lambda m: AlphaFlow(m, start=0.8, end=0.2), "curriculum"),
        (lambda m: SoFlow(m, first=0.1, last=0.2), "alpha must fall"),
        (lambda m: MeanFlow(m, power=-1), "power"),
        (lambda m: AlphaFlow(m, power=-1), "power"),
        (lambda m: SoFlow(m, eps=-1), "eps"),
        (lambda m: AlphaFlow(m, temperature=-25), "temperature"),
        (lambda m: AlphaFlow(m, clamp=0.6), "clamp"),
        (lambda m: ContinuousConsistency(m, constant=-1), "constant"),
        (lambda m: Shortcut(m, steps=0), "steps"),
        (lambda m: MeanFlow(m, eps=0), "eps"),
    ],
)
def test_bad_settings_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build(FlowMap(Waves()))

"""The DiT against the official implementation's numbers, closed forms, and the properties that the paper claims."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imagenet.model.dit import (
    DiT,
    DiTConfig,
    Modulation,
    RMSNorm,
    embed_positions,
    embed_scalar,
    layer_norm,
    plain_attention,
    rms_norm,
)
from tests.differences import assert_right
from tvm_ref import TVM, Condition, FlowMap, Linear, Times, interpolate, sample
from tvm_ref.bound.lipschitz import power_iteration_norms

TINY = DiTConfig(input_size=8, hidden_size=32, depth=2, heads=2, classes=10)


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).with_name("official_tiny.safetensors"))


def part(golden, prefix):
    return {name.removeprefix(prefix): a for name, a in golden.items() if name.startswith(prefix)}


def official(golden, *, scaled=False, factor=1.0, **options):
    model = FlowMap(DiT(TINY, **options), scaled=scaled)
    model.network.load_state_dict({name: a * factor for name, a in part(golden, "weights.").items()})
    return model


def condition(golden):
    return Condition(golden["label"], golden["beta"])


def randomised(config=TINY, *, dtype=torch.float64, seed=0, **options):
    """A DiT whose zero-initialised layers are random too."""
    torch.manual_seed(seed)
    network = DiT(config, **options).to(dtype)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return network


def inputs(n=3, dtype=torch.float64):
    x = torch.randn(n, 4, 8, 8, dtype=dtype)
    u = torch.rand(2, n, dtype=dtype)
    return x, u.max(0).values, u.min(0).values, Condition(torch.arange(n) % 11, 0.3 + 0.7 * torch.rand(n, dtype=dtype))


def test_state_dict_has_the_released_names_and_shapes(golden):
    expected = {name: a.shape for name, a in part(golden, "weights.").items()}
    assert {name: a.shape for name, a in DiT(TINY).state_dict().items()} == expected


def test_positions_are_the_official_ones(golden):
    torch.testing.assert_close(embed_positions(4, 32), golden["weights.pos_embed"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_output_and_its_derivative_in_s_are_the_official_ones(golden, checkpointing):
    network = official(golden, checkpointing=checkpointing).network
    s = golden["s"]
    x_t = interpolate(golden["x0"], golden["x1"], golden["t"])
    F, dF_ds = torch.func.jvp(lambda s: network(x_t, golden["t"], s, condition(golden)), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(F, golden["F"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dF_ds, golden["dF_ds"], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_loss_terms_and_all_gradients_are_the_official_ones(golden, kind, checkpointing):
    model = official(golden, scaled=kind == "scaled", checkpointing=checkpointing)
    target = official(golden, scaled=kind == "scaled", factor=1.01).requires_grad_(False)
    times = Times(golden["t"], golden["s"], golden["s_prime"])
    terms = TVM(model, null_label=10)(golden["x0"], golden["x1"], times, condition(golden), target)
    torch.testing.assert_close(terms.jump, golden[f"terminal_loss_{kind}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.flow_matching, golden[f"flow_matching_loss_{kind}"], rtol=1e-5, atol=1e-6)
    terms.total.mean().backward()
    gradients = part(golden, f"grad_{kind}.")
    assert set(gradients) == {name for name, p in model.network.named_parameters()}
    for name, p in model.network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_samples_are_the_official_ones(golden):
    model = official(golden, scaled=True)
    out = sample(model, golden["x1"], 4, condition(golden))
    torch.testing.assert_close(out, golden["samples_4_steps_scaled"], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("size", "millions", "side"),
    [
        ((384, 12, 6), 33.452, 32), ((768, 12, 12), 132.078, 32), ((1024, 24, 16), 460.715, 32),
        ((1152, 28, 18), 678.363, 32), ((1152, 28, 18), 679.248, 64),
    ],
    ids=["S/2", "B/2", "L/2", "XL/2", "XL/2 of 64 x 64"],
)  # fmt: skip
def test_number_of_parameters(size, millions, side):
    with torch.device("meta"):
        network = DiT(DiTConfig(side, 2, 4, *size))
    assert sum(a.numel() for a in network.state_dict().values()) == pytest.approx(millions * 1e6, abs=500)


def test_initialisation_is_spectral_and_gives_zero():
    for time_init in ("normal", "spectral"):
        network = DiT(replace(TINY, time_init=time_init))
        for name, p in network.named_parameters():
            norm = float(torch.linalg.matrix_norm(p.detach().flatten(1), 2)) if p.ndim > 1 else None
            if "adaLN" in name or "final_layer" in name or name.endswith("bias"):
                assert not p.any(), name
            elif "norm" in name:
                assert (p == 1).all()
            elif "y_embedder" in name or ("_embedder.mlp" in name and time_init == "normal"):
                assert float(p.detach().std()) == pytest.approx(0.02, rel=0.15), name
            else:
                assert norm == pytest.approx(1, abs=1e-5), name
        assert not network(*inputs(dtype=torch.float32)).any()


def test_scalars_are_embedded_by_the_closed_form():
    e = embed_scalar(torch.tensor([0.0, 0.25]))
    assert e.shape == (2, 256)
    torch.testing.assert_close(e[0], torch.cat([torch.ones(128), torch.zeros(128)]).double())
    k = torch.arange(128, dtype=torch.float64)
    torch.testing.assert_close(e[1, :128], torch.cos(0.25 * 10000 ** (-k / 128)))
    torch.testing.assert_close(e[1, 128:], torch.sin(0.25 * 10000 ** (-k / 128)))


@pytest.mark.parametrize("option", [{}, {"block_norm": "layer"}, {"qk_norm": False}, {"modulation_norm": False}])
def test_tangents_through_the_whole_network_match_central_differences(option):
    network = randomised(replace(TINY, **option))
    x, t, s, c = inputs()
    directions = [torch.randn_like(a) for a in (x, t, s)]
    _, tangent = torch.func.jvp(lambda x, t, s: network(x, t, s, c), (x, t, s), tuple(directions))

    def along(h):
        return network(*(a + h * d for a, d in zip((x, t, s), directions, strict=True)), c)

    h = 1e-4
    central = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)  # of fourth order
    torch.testing.assert_close(tangent, central, rtol=1e-6, atol=1e-7)


def test_recomputing_blocks_changes_no_tangent_and_no_gradient():
    results = []
    for checkpointing in (False, True):
        network = randomised(checkpointing=checkpointing)
        torch.manual_seed(1)
        x, t, s, c = inputs()
        F, dF = torch.func.jvp(lambda s, n=network, x=x, t=t, c=c: n(x, t, s, c), (s,), (torch.ones_like(s),))
        plain = network(x, t, s, c)
        (F.sin().sum() + dF.cos().sum() + plain.square().sum()).backward()
        results.append([F, dF, *(p.grad for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_recomputing_blocks_saves_memory():
    saved = []
    for checkpointing in (False, True):
        network = randomised(checkpointing=checkpointing)
        x, t, s, c = inputs()
        sizes = 0

        def pack(a):
            nonlocal sizes
            sizes += a.numel()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            torch.func.jvp(lambda s, n=network, x=x, t=t, c=c: n(x, t, s, c), (s,), (torch.ones_like(s),))
        saved.append(sizes)
    assert saved[1] < 0.3 * saved[0]


def test_gradients_are_finite_where_s_meets_t_and_at_the_ends():
    model = FlowMap(randomised(), scaled=True)
    x, _, _, c = inputs(4)
    for times in (torch.tensor([0.0, 0.3, 0.999, 1.0]).double(),):
        t, s = times.clone().requires_grad_(), times.clone().requires_grad_()
        f, df = model.displacement_and_terminal_velocity(x, t, s, c)
        assert not f.any()
        torch.testing.assert_close(df, model.velocity(x, t, c))
        gradients = torch.autograd.grad(f.square().sum() + df.square().sum(), [t, s, *model.parameters()])
        assert all(torch.isfinite(g).all() for g in gradients)
        assert gradients[1].any()


def test_without_a_condition_it_is_no_class_and_no_guidance():
    network = randomised()
    x, t, s, _ = inputs()
    torch.testing.assert_close(network(x, t, s), network(x, t, s, Condition(torch.full((3,), 10), torch.ones(3))))


def test_rms_norm_jacobian_is_the_closed_form_and_its_norm_is_at_most_one_over_the_root_of_eps():
    """Appendix B.1: J = (I - x x^T / (D r^2)) / r with r^2 = mean(x^2) + eps, so ||J|| = 1/r <= 1/sqrt(eps)."""
    for size in (0.0, 1e-6, 1e-2, 1.0, 1e3):
        x = size * torch.randn(16, dtype=torch.float64)
        jacobian = torch.func.jacrev(rms_norm)(x)
        r = (x.square().mean() + 1e-6).sqrt()
        torch.testing.assert_close(jacobian, (torch.eye(16) - torch.outer(x, x) / (16 * r**2)) / r)
        norm = torch.linalg.matrix_norm(jacobian, 2)
        torch.testing.assert_close(norm, 1 / r)
        assert norm <= 1000 * (1 + 1e-12)


def test_layer_norm_is_pytorchs_with_a_right_gradient_through_a_jvp():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x), torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
    assert_right(layer_norm, [x], mode=contextlib.nullcontext)


def test_layer_norm_has_no_slower_growth_than_rms_norm_at_constant_inputs():
    """A constant token is the worst case of LayerNorm (its variance vanishes) and an ordinary one for RMSNorm."""
    x = torch.full((16,), 5.0, dtype=torch.float64)
    steep = torch.linalg.matrix_norm(torch.func.jacrev(layer_norm)(x), 2)
    tame = torch.linalg.matrix_norm(torch.func.jacrev(rms_norm)(x), 2)
    assert steep == pytest.approx(1000)
    assert tame == pytest.approx(0.2, rel=1e-6)


def test_modulation_is_bounded_whatever_the_weights():
    """Eq. 16: every vector has norm at most sqrt(D)."""
    for factor in (1e-3, 1.0, 1e6):
        modulation = Modulation(TINY, 6).double()
        nn.init.normal_(modulation[1].weight, std=factor)
        for vector in modulation(10 * torch.randn(5, 32, dtype=torch.float64)):
            assert vector.shape == (5, 1, 32)
            assert (torch.linalg.vector_norm(vector, dim=-1) <= 32**0.5 + 1e-9).all()
    loose = Modulation(replace(TINY, modulation_norm=False), 6).double()
    nn.init.normal_(loose[1].weight, std=1e6)
    assert max(float(v.detach().abs().max()) for v in loose(torch.randn(5, 32, dtype=torch.float64))) > 1e4


def test_normalised_queries_and_keys_bound_the_logits():
    q, k = (RMSNorm(16)(1e4 * torch.randn(2, 2, 7, 16)) for _ in range(2))
    assert (q @ k.transpose(-1, -2)).abs().max() <= 16 * (1 + 1e-5)


@pytest.mark.slow
def test_steepness_stays_as_weights_grow_where_a_plain_dit_explodes():
    """Normalised vectors forget the size of their weights, so neither modulation nor logits can drive ||dF/dx|| up."""
    steepness = {}
    for name, option in {"tamed": {}, "plain": {"qk_norm": False, "modulation_norm": False}}.items():
        x, t, _, c = inputs()
        for factor in (1e2, 1e4):
            network = randomised(replace(TINY, **option))
            with torch.no_grad():
                for layer in (*network.blocks, network.final_layer):
                    layer.adaLN_modulation[1].weight.mul_(factor)
                    layer.adaLN_modulation[1].bias.mul_(factor)
                for block in network.blocks:
                    block.attn.qkv.weight[:64].mul_(factor)  # queries and keys
                    block.attn.qkv.bias[:64].mul_(factor)
            norms = power_iteration_norms(lambda x, n=network, t=t, c=c: n(x, t, t, c), x, 10)
            steepness[name, factor] = float(norms.max())
    assert steepness["tamed", 1e4] == pytest.approx(steepness["tamed", 1e2], rel=1e-3), steepness
    assert max(steepness["plain", 1e2], steepness["plain", 1e4]) > 100 * steepness["tamed", 1e4], steepness


def test_plain_attention_is_a_mean_of_values_under_equal_keys():
    q, v = torch.randn(2, 2, 3, 7, 4, dtype=torch.float64)
    k = torch.randn(2, 3, 1, 4, dtype=torch.float64).expand(2, 3, 7, 4)
    torch.testing.assert_close(plain_attention(q, k, v), v.mean(2, keepdim=True).expand(2, 3, 7, 4))


def test_attention_is_an_argument():
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return plain_attention(q, k, v)

    network = DiT(TINY, counted)
    network(*inputs(dtype=torch.float32))
    assert calls == [(3, 2, 16, 16)] * 2


def test_every_linear_layer_is_lean_and_a_jvp_costs_two_forwards():
    """All matrix products are doubled by a JVP in s, except the patch embedding's and those of what knows no s."""
    network = DiT(TINY)
    assert not [m for m in network.modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear)]
    x, t, s, c = inputs(dtype=torch.float32)
    with FlopCounterMode(display=False) as one:
        network(x, t, s, c)
    with FlopCounterMode(display=False) as dual:
        torch.func.jvp(lambda s: network(x, t, s, c), (s,), (torch.ones_like(s),))
    assert 1.9 < dual.get_total_flops() / one.get_total_flops() < 2.25  # attention's products have three, not two


BAD = {
    "no blocks": {"depth": 0},
    "patches that do not tile": {"patch_size": 3},
    "heads that do not divide": {"heads": 5},
    "no room for positions": {"hidden_size": 30, "heads": 2},
    "an unknown start": {"time_init": "zeros"},
}


@pytest.mark.bad_shapes
@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(ValueError, match=r"must|divide|is"):
        replace(TINY, **fields)

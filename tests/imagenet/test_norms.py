"""Figure 4 in the small: what its variants share, and whose gradient is right."""

import json
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from imagenet import norms
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from tests.commands import one_line
from tests.differences import difference, randn_like
from tvm_ref import Condition
from tvm_ref.seeding import generator

TINY = replace(norms.BASE, hidden_size=8, depth=1, heads=2, patch_size=4, batch_size=4, steps=2, lr=1e-3)


def randomised(variant):
    """The map of a training in float64, whose zero-initialised layers are random too."""
    model = norms.make_training(TINY, variant).model.double()
    for k, p in enumerate(model.parameters()):
        p.data.add_(0.5 * randn_like(p.data, k))
    return model


def test_variants_start_from_the_same_weights_and_see_the_same_batches():
    states = {v: norms.make_training(TINY, v).model.state_dict() for v in norms.VARIANTS}
    usual = states["exact"]
    assert states["pytorch"].keys() == usual.keys()
    gains = states["semi-lipschitz"].keys() - usual.keys()
    assert gains == {f"network.blocks.0.attn.{a}_norm.weight" for a in "qk"}
    for state in states.values():
        assert all(torch.equal(state[name], usual[name]) for name in usual)


def test_both_layer_norms_have_the_same_values_in_all_three_copies():
    pytorch, exact = (norms.make_training(TINY, v) for v in ("pytorch", "exact"))
    batch = Batches(TINY, load_data(TINY))[0]
    x, t, s = batch.x1, batch.times.t, batch.times.s
    for name in ("model", "target", "ema"):
        a, b = getattr(pytorch, name), getattr(exact, name)
        a, b = (getattr(m, "module", m).network for m in (a, b))
        for k, (p, q) in enumerate(zip(a.parameters(), b.parameters(), strict=True)):
            p.data = q.data = q.data + 0.5 * randn_like(q.data, k)
        assert all(layer.norm is norms.pytorch_layer_norm for layer in (*a.blocks, a.final_layer))
        torch.testing.assert_close(a(x, t, s), b(x, t, s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", norms.VARIANTS)
def test_the_gradient_through_the_jvp_is_wrong_for_pytorchs_norm_alone(variant):
    """Compare the gradient of sum c df/ds along a random direction of weights with central differences."""
    model, g = randomised(variant), generator(0)
    x, c = (torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=g) for _ in range(2))
    s = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    t = s + 0.5
    condition = Condition(torch.arange(4), torch.ones_like(t))
    weights = list(model.parameters())
    starts = [p.detach().clone() for p in weights]
    directions = [0.1 * randn_like(p, 100 + k) for k, p in enumerate(starts)]
    loss = (c * model.displacement_and_terminal_velocity(x, t, s, condition)[1]).sum()
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    along = sum((a * b).sum() for a, b in zip(found, directions, strict=True))

    def moved(e):
        for p, start, direction in zip(weights, starts, directions, strict=True):
            p.data = start + e * direction
        return (c * difference(lambda h: model.displacement(x, t, s + h, condition))).sum()

    with torch.no_grad():
        expected = difference(moved)
    error = float(abs(along - expected) / abs(expected))
    assert error > 1e-2 if variant == "pytorch" else error < 1e-6


def test_a_training_that_breaks_is_recorded_up_to_there():
    config = replace(TINY, steps=40, lr=1e30)
    curves = norms.follow(norms.make_training(config, "exact"), Batches(config, load_data(config)))
    assert curves["broken_at"] < 40
    assert len(curves["jump"]) == curves["broken_at"] // norms.EVERY


def test_the_command_writes_curves_and_a_picture_and_adds_what_the_file_lacks(tmp_path, monkeypatch, capsys):
    out = tmp_path / "norms.json"
    options = ["--seeds", "1", "--steps", "10", "--batch-size", "2", "--depth", "1", "--out", str(out)]
    assert norms.main(["--cases", "8:0.001", *options]) == 0
    first = json.loads(out.read_text())["runs"]
    trained, follow = [], norms.follow
    monkeypatch.setattr(norms, "follow", lambda training, batches: trained.append(1) or follow(training, batches))
    cases = ["8:0.001", "12:0.01:bfloat16"]
    assert norms.main(["--cases", *cases, *options]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert len(trained) == 3
    assert runs[:3] == first
    assert [(r["case"], r["variant"]) for r in runs] == [(c, v) for c in cases for v in norms.VARIANTS]
    assert all(
        len(r[name]) == 1 and min(r[name]) > 0 for r in runs for name in ("flow_matching", "gradient_norm", "embedding")
    )
    assert imread(tmp_path / "norms.png").std() > 0.01
    capsys.readouterr()  # the progress of both
    assert "other sizes" in one_line(capsys, norms.main, ["--cases", *cases, *options, "--steps", "20"])


def test_bad_options(tmp_path, capsys):
    for case in ("64", "8:0.1:float8", "10:0.1"):
        one_line(capsys, norms.main, ["--cases", case, "--out", str(tmp_path / "a.json")])
    one_line(capsys, norms.main, ["--seeds", "0", "--out", str(tmp_path / "a.json")])
    one_line(capsys, norms.main, ["--out", str(tmp_path / "a.txt")])

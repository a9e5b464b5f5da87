"""tutorials/tvm_in_one_file.py stands alone, its loss is the library's, and it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from tutorials import tvm_in_one_file as script
from tvm_ref import TVM, FlowMap, Times, TimeSampler

SCRIPT = Path(script.__file__)


def test_it_is_short_and_needs_torch_and_matplotlib_only():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 80
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name if isinstance(n, ast.Import) else n.module for n in imports for a in n.names}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "matplotlib"}


def test_its_loss_and_gradients_are_the_library_s():
    """Same network, teacher, times and batch, in float64; 1e-12 is rounding."""
    torch.manual_seed(0)
    net, teacher = script.Network().double(), script.Network().double().requires_grad_(False)
    x0, x1 = script.moons(64).double(), torch.randn(64, 2, dtype=torch.float64)
    t, s, s_prime = (time.double() for time in script.draw_times(64))
    ours = script.tvm_loss(net, teacher, x0, x1, t, s, s_prime)
    model, target = (FlowMap(lambda x, t, s, _, network=network: network(x, t, s)) for network in (net, teacher))
    terms = TVM(model)(x0, x1, Times(t, s, s_prime), target=target)
    torch.testing.assert_close(ours, terms.total, rtol=1e-12, atol=1e-12)
    weights = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(loss.mean(), weights) for loss in (ours, terms.total)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_its_times_follow_the_library_s_law():
    """Quantiles of t, s, s' and t - s of 200,000 draws; their sampling error is below 0.004."""
    torch.manual_seed(0)
    ours, theirs = script.draw_times(200_000), TimeSampler(noise_share=0.25).draw(200_000)
    assert (ours[0] > ours[1]).all()
    assert (ours[0] <= 1).all()
    levels = torch.linspace(0.05, 0.95, 19)
    for a, b in zip((*ours, ours[0] - ours[1]), (*theirs, theirs.t - theirs.s), strict=True):
        torch.testing.assert_close(a.quantile(levels), b.quantile(levels), rtol=0, atol=6e-3)


@pytest.mark.slow
def test_it_runs_and_draws_a_picture(tmp_path):
    command = [sys.executable, SCRIPT, "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.startswith("step 3: loss ")
    assert result.stderr == ""
    assert imread(tmp_path / "tvm_in_one_file.png").std() > 0.01

import math
from dataclasses import replace

import pytest
import torch

from tvm_ref.objectives import FlowMatching
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.report.report import least_flow_matching_loss
from tvm_ref.toy.run import Run
from tvm_ref.toy.training import draw_block


@pytest.mark.parametrize("options", [{}, {"conditional": True, "w": 2.0}, {"objective": "pid"}], ids=["", "w 2", "pid"])
@pytest.mark.slow
def test_the_least_loss_is_that_of_the_exact_velocity(tmp_path, options):
    """It once was the mean of 51,200 squared errors, uncertain by 0.007."""
    config = ToyConfig(**options)
    this = Run(tmp_path, config)
    least = least_flow_matching_loss(this)
    null_label = this.distribution.num_classes if config.guided else None
    exact = FlowMatching(this.distribution, null_label=null_label)
    batches = [batch for block in (1, 2) for batch in draw_block(config, this.distribution, block)]
    losses = torch.stack([exact(b.x0, b.x1, b.times, b.condition).flow_matching.mean() for b in batches])
    assert least == pytest.approx(float(losses.mean()), abs=4 * float(losses.std()) / math.sqrt(len(losses)))
    assert least == pytest.approx(least_flow_matching_loss(Run(tmp_path, replace(config, seed=1))), abs=0.002)


def test_an_objective_whose_flow_matching_is_of_some_samples_has_no_least_loss(tmp_path):
    assert least_flow_matching_loss(Run(tmp_path, ToyConfig(objective="lsd"))) is None

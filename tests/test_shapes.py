"""`pytest --check-shapes`: right shapes pass, in all packages, and one that is not what a signature says is found."""

import pytest

from tests.processes import ROOT, python

WRONG = """
import pytest, torch

import imagenet.train, jvp_attention
from imagenet.model.dit import modulate
from tvm_ref.interpolant import conditional_velocity, interpolate

x, t = torch.zeros(3, 2), torch.zeros(3)

def test_right():
    assert interpolate(x, x, t).shape == x.shape

def test_wrong():
    for call in (lambda: conditional_velocity(x, x[:2]), lambda: modulate(x, x, x)):
        with pytest.raises(Exception, match="Type-check"):
            call()
"""


@pytest.mark.slow
def test_shapes_are_checked_where_that_is_asked_for(tmp_path):
    (tmp_path / "test_wrong.py").write_text(WRONG)
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "tests.conftest", "--rootdir", ROOT, "--check-shapes"]
    done = python("-m", "pytest", *options, tmp_path)
    assert done.returncode == 0, done.stdout

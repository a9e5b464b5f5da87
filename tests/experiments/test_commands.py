"""The commands of this folder: their help, and bad input in one line."""

import pytest

from tests.commands import one_line
from tvm_ref.experiments import compare, seeds


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (compare, ["--steps", "0"]),
        (compare, ["--rates", "0"]),
        (compare, ["--seeds", "0"]),
        (seeds, ["--seeds", "0"]),
        (seeds, ["--dist", "moon"]),
    ],
)
def test_bad_input_to_the_other_commands(capsys, module, options):
    one_line(capsys, module.main, options)

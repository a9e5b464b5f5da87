import os
import signal
import sys

import pytest
import torch
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch.compile starts processes of its own, and waits for them
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

UNCHECKED = {"bad_shapes": "raises before the function's own check", "compiles": "cannot be compiled by torch.compile"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what is marked slow")
    parser.addoption("--check-shapes", action="store_true", help="check every shape in a signature at run time")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-shapes"):
        packages = ["tvm_ref", "imagenet", "jvp_attention"]
        if loaded := sorted(set(packages) & set(sys.modules)):
            raise pytest.UsageError(f"a conftest imports {loaded[0]} before its shapes can be checked")
        from tests import shape_checker  # under a name of its own, as pytest imports the package `tests` anew

        sys.modules["shape_checker"] = shape_checker
        # of attention all but the kernels, whose functions are Triton's
        names = ["api", "fallback", "launch", "layout", "operators", "reference", "shapes", "tile_sizes"]
        attention = [f"jvp_attention.{name}" for name in names]
        install_import_hook([*packages[:2], *attention], "shape_checker.checker")


def left_out(config: pytest.Config) -> set[str]:
    """Markers of tests that nobody asked for: by --slow, by an expression after -m, or by a test's own name."""
    expression = config.getoption("-m")
    if any("::" in argument for argument in config.args):
        return set()
    slow = config.getoption("--slow") or expression
    return {*(() if slow else ("slow",)), *(() if "hour" in expression else ("hour",))}


def pytest_report_header(config: pytest.Config) -> str | None:
    return "slow tests are left out; --slow adds them" if "slow" in left_out(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = [i for i in items if any(i.get_closest_marker(marker) for marker in left_out(config))]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in set(unwanted)]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run it there with `pytest -m gpu`"))
        for marker, reason in UNCHECKED.items() if config.getoption("--check-shapes") else ():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"--check-shapes {reason}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

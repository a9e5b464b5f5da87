"""The wheel: what it holds, and that it works away from the checkout; and what the core of the library depends on."""

import ast
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import tvm_ref

ROOT = Path(__file__).parents[1]
PACKAGES = {"tvm_ref": ROOT, "imagenet": ROOT, "jvp_attention": ROOT / "kernels"}
CORE = {"torch", "numpy", "safetensors", "jaxtyping"}  # all that `import tvm_ref` may need
A_STEP = """
import sys
for name in %r:
    sys.modules[name] = None  # an import of it fails
import torch
from tvm_ref import TVM, FlowMap, TimeSampler, sample
model = FlowMap(lambda x, t, s, c: x * 0.1 * s[:, None])
loss = TVM(model)(torch.randn(4, 2), torch.randn(4, 2), TimeSampler().draw(4), target=model)
print(sample(model, torch.randn(4, 2), 1).shape, loss.total.isfinite().all())
print(sys.modules["tvm_ref"].__file__, sys.modules["jvp_attention"].__file__)
"""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tvm_ref").glob("*.py")) + sorted((ROOT / "tvm_ref").glob("objectives/*.py"))
)
def test_the_core_imports_what_pyproject_says(path):
    """At the top level of its modules; distances.py imports others within its functions."""
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name if isinstance(n, ast.Import) else n.module for n in imports for a in n.names}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= CORE | {"tvm_ref", "jvp_attention"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tvm_ref", "imagenet", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, root in PACKAGES.items():
        assert f"{package}/py.typed" in names
        assert {path.relative_to(root).as_posix() for path in (root / package).rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"tvm_ref-{tvm_ref.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_requires_four_packages_and_the_rest_by_extras(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
    requirements = metadata.get_all("Requires-Dist")
    assert {r.split(">")[0] for r in requirements if "extra ==" not in r} == CORE
    assert metadata["Version"] == tvm_ref.__version__


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter with the wheel installed, beside the libraries of the running one, but not its checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    libraries = [p for p in sys.path if p.endswith("-packages") or p in site.getsitepackages()]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")  # as plain paths: their .pth are not read
    return folder / "bin" / "python"


def run(python, folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_torchrun_finds_the_command_away_from_the_checkout(python, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = run(python, tmp_path, *torchrun, "-m", "imagenet.train", "--help")
    assert done.returncode == 0, done.stderr
    assert "torchrun imagenet/train.py" in done.stdout


@pytest.mark.slow
def test_a_step_and_a_sample_need_the_core_alone(python, tmp_path):
    others = ["triton", "scipy", "ot", "matplotlib", "pytorch_optimizer", "tqdm", "sklearn", "PIL", "torchvision"]
    done = run(python, tmp_path, "-c", A_STEP % others)
    assert done.returncode == 0, done.stderr
    result, files = done.stdout.splitlines()
    assert result == "torch.Size([4, 2]) tensor(True)"
    assert all(Path(file).is_relative_to(python.parents[1]) for file in files.split())

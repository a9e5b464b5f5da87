"""Wheels: what they hold, and that they work away from the checkout; and what the core of the library depends on."""

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

import jvp_attention
import tvm_ref

ROOT = Path(__file__).parents[1]
PACKAGES = {"tvm_ref": ROOT, "imagenet": ROOT, "tvm_ref_kernels/jvp_attention": ROOT / "kernels"}  # with their parents
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
    return build(source, out)


def build(source, out):
    """Build the wheel of a folder with a pyproject.toml."""
    command = [sys.executable, "-c", "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"]
    subprocess.run([*command, str(out)], cwd=source, check=True, capture_output=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, root in PACKAGES.items():
        folder = root / Path(package).name
        assert f"{package}/py.typed" in names
        assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")} <= names
    tops = {"tvm_ref", "imagenet", "tvm_ref_kernels", "tvm_ref_kernels.pth"}
    assert {name.split("/")[0] for name in names} == tops | {f"tvm_ref-{tvm_ref.__version__}.dist-info"}


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
def test_weights_come_along(python, tmp_path):
    done = run(python, tmp_path, "-m", "imagenet.sample", "digits", "--out", "digits.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.png").exists()
    done = run(python, tmp_path, "-c", "from tvm_ref.toy.run import load_run; print(load_run('moons')[0].steps)")
    assert done.stdout == "3000\n", done.stderr


@pytest.mark.slow
def test_a_step_and_a_sample_need_the_core_alone(python, tmp_path):
    others = ["triton", "scipy", "ot", "matplotlib", "pytorch_optimizer", "tqdm", "sklearn", "PIL", "torchvision"]
    done = run(python, tmp_path, "-c", A_STEP % others)
    assert done.returncode == 0, done.stderr
    result, files = done.stdout.splitlines()
    assert result == "torch.Size([4, 2]) tensor(True)"
    assert all(Path(file).is_relative_to(python.parents[1]) for file in files.split())


@pytest.mark.slow
def test_both_wheels_lie_side_by_side_and_the_kernels_own_comes_first(wheel, python, tmp_path):
    kernels = build(ROOT / "kernels", tmp_path)
    assert not {*zipfile.ZipFile(wheel).namelist()} & {*zipfile.ZipFile(kernels).namelist()}
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    found = (
        "import jvp_attention, tvm_ref; print(jvp_attention.__file__, jvp_attention.__version__, tvm_ref.__version__)"
    )
    versions = [jvp_attention.__version__, tvm_ref.__version__]
    for folder in (packages / "tvm_ref_kernels", packages):
        done = run(python, tmp_path, "-c", found)
        assert done.stdout.split() == [str(folder / "jvp_attention" / "__init__.py"), *versions], done.stderr
        zipfile.ZipFile(kernels).extractall(packages)

"""The wheel: what it holds, and that it works away from the checkout."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = {"tvm_ref": ROOT, "imagenet": ROOT, "jvp_attention": ROOT / "kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tvm_ref", "imagenet", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, root in PACKAGES.items():
        assert f"{package}/py.typed" in names
        assert {path.relative_to(root).as_posix() for path in (root / package).rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "tvm_ref-0.1.0.dist-info"}


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


def test_the_installed_packages_are_the_wheel_s(python, tmp_path):
    code = "import imagenet, jvp_attention, tvm_ref as t; print(imagenet.__file__, jvp_attention.__file__, t.__file__)"
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    for path in done.stdout.split():
        assert Path(path).is_relative_to(python.parents[1]), path


def test_torchrun_finds_the_command_away_from_the_checkout(python, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = run(python, tmp_path, *torchrun, "-m", "imagenet.train", "--help")
    assert done.returncode == 0, done.stderr
    assert "torchrun imagenet/train.py" in done.stdout

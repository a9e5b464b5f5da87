"""Who imports whom: read from the sources, imports inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {"tvm_ref": ROOT, "imagenet": ROOT, "jvp_attention": ROOT / "kernels"}  # package: folder that it lies in


def find_modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package, root in ROOTS.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()
SOURCES = {name: path.read_text() for name, path in MODULES.items()}


def imported_names(source: str) -> set[str]:
    """Dotted names that a source imports; `from a import b` gives a.b, which may be a module or not."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """The project's module that a dotted name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def make_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules of the project that each module imports."""
    return {
        name: {found for found in map(module_of, imported_names(source)) if found is not None and found != name}
        for name, source in sources.items()
    }


GRAPH = make_graph(SOURCES)
COMMANDS = {name for name, source in SOURCES.items() if '__name__ == "__main__"' in source}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_by_way_of_others():
    assert circle(GRAPH) is None


@pytest.mark.slow
def test_a_circle_would_be_found():
    """Also one that is closed by an import inside a function, as that which data.py and digits.py once had."""
    more = SOURCES | {"imagenet.data.noise": "def f():\n    from imagenet.sampler import Generator\n"}
    assert {"imagenet.data.noise", "imagenet.sampler"} <= set(circle(make_graph(more)))


def test_the_graph_is_read():
    assert "imagenet.data.digits" in GRAPH["imagenet.data.image_sets"]  # inside a function
    assert "jvp_attention" in GRAPH["imagenet.model.dit"]
    assert "imagenet.distributed" in GRAPH["imagenet.train"]  # from imagenet import parallel


def test_commands_of_imagenet_import_library_modules_alone():
    commands = {name for name in COMMANDS if name.startswith("imagenet.")}
    names = {"train", "sample", "evaluate", "encode", "convert", "benchmark", "digit_seeds"}
    assert commands == {f"imagenet.{name}" for name in names} | {"imagenet.cost.table"}
    for name, imported in GRAPH.items():
        assert not imported & commands, name


def top(module: str) -> str:
    """Package, and subpackage if the module lies in one."""
    parts = module.split(".")
    return (
        ".".join(parts[:2]) if module.startswith(("tvm_ref.toy", "tvm_ref.bound", "tvm_ref.experiments")) else parts[0]
    )


# FlowMap's JVP runs in jvp_attention.jvp_ready, without which common layers have wrong gradients. The mode is the other
# package's, as it is of use to whoever takes a JVP; both are in one wheel, and it needs neither triton nor a GPU.
EXCEPTION = ("tvm_ref.flow_map", "jvp_attention")


def packages_of(name: str) -> set[str]:
    """Packages that a module imports from, but for the exception."""
    packages = {top(imported) for imported in GRAPH[name]}
    return packages - {EXCEPTION[1]} if name == EXCEPTION[0] else packages


@pytest.mark.parametrize("name", sorted(name for name in MODULES if top(name) in ("tvm_ref", "jvp_attention")))
def test_the_core_stands_alone(name):
    """What lies directly in tvm_ref, and the kernels, import neither each other nor what is built on them."""
    assert packages_of(name) <= {top(name)}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("tvm_ref.")))
def test_the_method_knows_nothing_of_images_and_kernels(name):
    assert not {"imagenet", "jvp_attention"} & packages_of(name)

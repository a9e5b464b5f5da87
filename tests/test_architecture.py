"""Who imports whom: read from the sources, imports inside functions included."""

import ast
from graphlib import TopologicalSorter
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


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(GRAPH).prepare()  # a circle, also one by an import inside a function, is a CycleError


def test_the_graph_is_read():
    assert "imagenet.data.digits" in GRAPH["imagenet.data.image_sets"]  # inside a function
    assert "jvp_attention" in GRAPH["imagenet.model.dit"]
    assert "imagenet.model.distributed" in GRAPH["imagenet.train"]  # from imagenet.model import distributed


def test_commands_of_imagenet_import_library_modules_alone():
    commands = {name for name in COMMANDS if name.startswith("imagenet.")}
    names = {
        "train",
        "average",
        "sample",
        "evaluate",
        "encode",
        "convert",
        "benchmark",
        "digit_seeds",
        "norms",
        "experiments.random_guidance",
        "experiments.differences",
        "experiments.fashion",
        "experiments.memory",
        "experiments.oracle",
    }
    assert commands == {f"imagenet.{name}" for name in names} | {"imagenet.cost.table"}
    for name, imported in GRAPH.items():
        assert not imported & commands, name


# From the ground up: what lies in a room imports only from its own and from rooms below. A room is a folder, or a
# file on the top floor of imagenet/; what lies deeper and is not named belongs to the room around it.
METHOD = ("tvm_ref", "tvm_ref.objectives", "tvm_ref.cli", "tvm_ref.toy.data", "tvm_ref.toy", "tvm_ref.bound")
IMAGES = ("model", "config", "cost", "data", "foreign", "weights", "sampler", "metrics", "training", "experiments")
STOREYS = ("jvp_attention", *METHOD, "tvm_ref.experiments", *(f"imagenet.{room}" for room in IMAGES), "imagenet")
# FlowMap's JVP runs in jvp_attention.jvp_ready, without which common layers have wrong gradients. The mode is the other
# package's, as it is of use to whoever takes a JVP; both are in one wheel, and it needs neither triton nor a GPU.
EXCEPTIONS = {("tvm_ref.flow_map", "jvp_attention")}


def room(module: str) -> str:
    """The room that a module lies in."""
    while module not in STOREYS:
        module = module.rpartition(".")[0]
    return module


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_only_from_rooms_below(name):
    if name in ("tvm_ref", "imagenet"):  # the doors, which hand out public names of the rooms behind them
        return
    above = {to for to in GRAPH[name] if STOREYS.index(room(to)) > STOREYS.index(room(name))}
    assert not above - {"tvm_ref", "imagenet"}
    if room(name) in METHOD[:2]:  # the method knows no command line, and of attention only the mode
        beside = {
            to for to in GRAPH[name] if room(to) in ("tvm_ref.cli", "jvp_attention") and (name, to) not in EXCEPTIONS
        }
        assert not beside
    if name.startswith("jvp_attention"):
        assert all(to.startswith("jvp_attention") for to in GRAPH[name])


def test_the_command_line_stands_alone():
    """Commands and configurations import cli; it imports nothing of the project."""
    assert all(room(to) == "tvm_ref.cli" for name in MODULES if room(name) == "tvm_ref.cli" for to in GRAPH[name])

"""List the commands of this project: `python -m tvm_ref`."""

import ast
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("tvm_ref", "imagenet", "jvp_attention")


def main() -> None:
    """Print every command of the installed packages, with the first line of its docstring."""
    roots = [Path(spec.origin).parent for spec in map(find_spec, PACKAGES) if spec is not None and spec.origin]
    for path in (path for root in roots for path in sorted(root.rglob("*.py")) if path != Path(__file__)):
        source = path.read_text()
        if '__name__ == "__main__"' in source:
            root = next(root for root in roots if root in path.parents)
            name = ".".join(path.with_suffix("").relative_to(root.parent).parts).removesuffix(".__main__")
            print(f"python -m {name:38} {(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    print("each with --help")


if __name__ == "__main__":
    main()

"""Print how big the project is, and how much of its mathematics is guards and comments: `python tests/sizes.py`."""

import ast
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATHEMATICS = [  # where equations stand; checks.py is where guards belong
    "tvm_ref/*.py", "tvm_ref/objectives/*.py", "tvm_ref/bound/chain.py", "tvm_ref/bound/paths.py",
    "tvm_ref/toy/data/mixture.py",
    "kernels/jvp_attention/[fbr]*w*.py", "kernels/jvp_attention/ref*.py",
    "imagenet/model/dit.py", "imagenet/training/step.py",
]  # fmt: skip


def measure(path: Path) -> Counter[str]:
    """Count lines: all, code (no docstrings, blanks, comments), comments, and guards among the code."""
    source = path.read_text()
    lines, code, guards = source.splitlines(), set(), set()
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    code = {i for i, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            span = set(range(node.lineno, node.end_lineno + 1))
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
                code -= span  # a docstring
            elif isinstance(node, ast.Raise | ast.ExceptHandler) or ast.unparse(node)[:13] == "warnings.warn":
                guards |= span
            elif isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise):
                guards |= span  # its condition, too
    return Counter(lines=len(lines), code=len(code), comments=len(comments), guards=len(guards & code))


def total(*patterns: str) -> Counter[str]:
    return sum(
        (
            measure(p)
            for pattern in patterns
            for p in ROOT.glob(pattern)
            if p.name not in ("checks.py", "__init__.py") or "**" in pattern
        ),
        Counter(),
    )


def main() -> None:
    for name in ("tvm_ref", "kernels", "imagenet", "tutorials", "tests"):
        print(f"{name:10} {total(f'{name}/**/*.py')['lines']:6,} lines of Python")
    folders = Counter(p.parent for name in ("tvm_ref", "kernels", "imagenet") for p in (ROOT / name).rglob("*.py"))
    print("Python files side by side:", ", ".join(f"{f.relative_to(ROOT)} {n}" for f, n in folders.most_common(6)))
    command = [sys.executable, "-m", "imagenet.train", "--help"]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    print("options of imagenet/train.py:", len(re.findall(r"^  (?:-\w, )?--(?!help)", text, re.MULTILINE)))
    code, comments, guards = (total(*MATHEMATICS)[what] for what in ("code", "comments", "guards"))
    per_hundred = f"{100 * guards / code:.1f} guards and {100 * comments / code:.1f} comments per 100"
    print(f"files of mathematics: {code:,} lines of code, {per_hundred}")
    for page in sorted(p for p in ROOT.rglob("*.md") if not {".venv", "runs", ".pytest_cache"} & {*p.parts}):
        print(f"{len(page.read_text().split()):6,} words in {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

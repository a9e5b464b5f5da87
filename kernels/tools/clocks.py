"""A static roofline: clocks of a multiprocessor per pair of tiles, counted in the inner loop's machine code.

It is for choosing tiles where no GPU is, and knows nothing of latencies, memory or what overlaps. Per turn of the loop:

- tensor: the matrix units multiply at the architecture's full rate (RATE below);
- operands: what Hopper's matrix instructions (HGMMA) read from shared memory, 128 bytes per clock: the right factor
  always, the left one unless it lies in registers, once for each group of four warps;
- exp2: 16 per clock (MUFU), and so are single conversions to 16 bits (F2F);
- loads: what comes from the second-level cache (LDGSTS of 16 bytes), 24 bytes per clock, about what an H100 was seen
  to reach; blocks on the same multiprocessor share it;
- issue: one instruction per clock in each of four schedulers, which share the warps evenly;
- barriers: BARRIER clocks for each instruction that waits for all warps or for the matrix units.

matrix, the sum over matrix instructions of the greater of tensor and operands, plus issue is the time if nothing of one
block overlaps; the greatest single figure is the time if everything does.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

RATE = {80: 1024, 86: 512, 89: 512, 90: 2048, 120: 512}  # multiplications and additions per clock, 16-bit, dense
OPERAND_BYTES = 128  # per clock, from shared memory
LOAD_BYTES = 24  # per clock, from the second-level cache
SPECIAL_RATE = 16  # functions per clock
SCHEDULERS = 4
BARRIER = 30  # clocks, a rough figure

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^(\.L\w+):")
WARPGROUP_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
WARP_PRODUCT = re.compile(r"HMMA\.(\d+)\.")  # of m16n8k16 as 16816
WAITS = ("BAR.", "WARPGROUP.DEPBAR", "DEPBAR", "WARPSYNC")


class Clocks(NamedTuple):
    """Clocks of a multiprocessor for one turn of the inner loop of one block."""

    tensor: float
    operands: float
    matrix: float
    loads: float
    exp2: float
    issue: float
    barriers: float

    def per_pairs(self, pairs: float) -> "Clocks":
        """Scale to the clocks of so many turns."""
        return Clocks(*(x * pairs for x in self))

    @property
    def without_overlap(self) -> float:
        """Matrix instructions and issue, one after the other."""
        return self.matrix + self.issue

    @property
    def limit(self) -> str:
        """The name of the greatest figure."""
        figures = {name: getattr(self, name) for name in ("tensor", "operands", "loads", "exp2", "issue", "barriers")}
        return max(figures, key=lambda name: figures[name])


def machine_code(cubin: bytes) -> str:
    """Return the text of a compiled kernel, by the nvdisasm that triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def inner_loop(code: str) -> list[tuple[str, str]]:
    """Find the instructions, as (name, operands), of the innermost loop with the most matmuls."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for text in code.splitlines():
        if label := LABEL.match(text.strip()):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(text):
            target = re.search(r"\.L\w+", found[2])
            if found[1].startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(instructions) + 1))
            instructions.append((found[1], found[2]))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] for b in loops if b != a)]
    bodies = [instructions[first:last] for first, last in inner]
    return max(bodies, key=lambda body: sum("MMA" in name for name, _ in body), default=[])


def count(code: str, warps: int, sm: int) -> Clocks:
    """Count the clocks of a kernel's inner loop, for blocks of so many warps.

    Raises:
        ValueError: the loop has no matrix instruction that is known (sm_100 has its own kind), or none at all.
    """
    body = inner_loop(code)
    tensor = operands = matrix = 0.0
    for name, arguments in body:
        if product := WARPGROUP_PRODUCT.match(name):
            rows, columns, depth = (int(x) for x in product.groups())
            left_in_registers = re.match(r"\s*R\d+, R", arguments) is not None
            one = rows * columns * depth / RATE[sm]
            read = 2 * depth * (columns + (0 if left_in_registers else rows)) / OPERAND_BYTES
            many = warps / 4
        elif product := WARP_PRODUCT.match(name):
            one, read, many = {"16816": 2048, "1688": 1024}[product[1]] / RATE[sm], 0.0, warps
        else:
            continue
        tensor, operands, matrix = tensor + many * one, operands + many * read, matrix + many * max(one, read)
    if not matrix:
        raise ValueError(f"no matrix instruction that is known for sm_{sm} in a loop")
    special = sum(name.startswith(("MUFU", "F2F.")) for name, _ in body)
    waits = sum(name.startswith(WAITS) for name, _ in body)
    loads = sum(name.startswith("LDGSTS") and name.endswith("128") for name, _ in body) * 16
    lanes = 32 * warps
    return Clocks(
        tensor=tensor,
        operands=operands,
        matrix=matrix,
        loads=lanes * loads / LOAD_BYTES,
        exp2=lanes * special / SPECIAL_RATE,
        issue=len(body) * warps / SCHEDULERS,
        barriers=waits * BARRIER,
    )

"""Read a table of points in 2D: a .npy file, or text with or without a header.

Columns of text are separated by commas, semicolons, tabs or blanks.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import UserError, require, user_errors

TEXT = (".csv", ".tsv", ".txt", ".dat")


def read_table(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Read points [N, 2] (float64) and the names of their columns.

    Raises:
        UserError: another kind of file, other than two columns, text, NaN or infinite values, fewer than 10 points.
        OSError: a file that is missing or cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (*TEXT, ".npy"):
        raise UserError(f"{path}: points come as {' '.join(TEXT)} or .npy, not '{kind or 'a file without extension'}'")
    columns: tuple[str, ...] = ()
    with user_errors(f"{path} is not a table of numbers", ValueError, TypeError):
        if kind == ".npy":
            points = np.load(path, allow_pickle=False)
            require(points.dtype.kind in "fiu", f"its type is {points.dtype}")
            points = points.astype(np.float64)
        else:
            points, columns = parse(path.read_text(encoding="utf-8-sig"))
    check(path, points)
    return torch.from_numpy(points), columns if len(columns) == 2 else ("x", "y")


def parse(text: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a table [N, M] and its header, empty if there is none, from text; lines that begin with # are left out.

    Raises:
        UserError: no lines, or text where numbers belong, with the number of the line.
    """
    rows: list[list[float]] = []
    header: tuple[str, ...] = ()
    lines = [(i, line) for i, line in enumerate(text.replace('"', "").splitlines(), 1) if line.strip(" \t,;")]
    lines = [(i, line) for i, line in lines if not line.lstrip().startswith("#")]
    require(bool(lines), "the file is empty")
    common = (mark for mark in ";\t," if 2 * sum(mark in line for _, line in lines) >= len(lines))
    separator = next(common, None)  # None: blanks
    for i, line in lines:
        cells = tuple(cell.strip() for cell in line.split(separator))
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            if rows or header:
                hint = "; write decimal points, not commas" if "," in line and separator != "," else ""
                raise UserError(f"line {i}: no numbers in {line.strip()!r:.60}{hint}") from None
            header = cells
            continue
        if rows and len(row) != len(rows[0]):
            raise UserError(f"line {i} has {len(row)} column{'s' * (len(row) > 1)}, and others have {len(rows[0])}")
        rows.append(row)
    # pandas numbers columns that have no names: "0,1" above numbers with points is a header, too
    if rows[:1] == [[0, 1]] and "." in text and lines[0][1].split(separator) == ["0", "1"]:
        header = ("0", "1")
        del rows[0]
    require(bool(rows), "nothing but a header")
    return np.array(rows), header


def check(path: Path, points: np.ndarray) -> None:
    """Raise ValueError, with what to do, for numbers that are no points in 2D."""
    if points.ndim != 2 or points.shape[1] != 2:
        shape = " x ".join(map(str, points.shape))
        raise UserError(f"{path}: points must be N x 2, got {shape}{_advice(points)}")
    require(len(points) >= 10, f"{path}: at least 10 points are needed, got {len(points)}")
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(1))
        raise UserError(f"{path}: points that are NaN or infinite: {len(bad)}, first point {bad[0] + 1}")
    for axis, spread in enumerate(np.ptp(points, axis=0), 1):
        require(bool(spread > 0), f"{path}: column {axis} is constant")


def _advice(points: np.ndarray) -> str:
    if points.ndim != 2 or points.shape[1] == 1:
        return "; columns are separated by commas, semicolons, tabs or blanks"
    if points.shape[1] == 3 and (np.diff(points[:, 0]) == 1).all():
        return "; the first column counts the rows, leave it out"
    return (
        "; this command draws in 2D: choose two columns, or train on all of them with TVM in your own loop, which "
        "takes any shape (README.md, 'In your own training loop')"
    )

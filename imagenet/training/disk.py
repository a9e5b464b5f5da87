"""What a checkpoint asks of the disk: that names are kept, and that files are what they were."""

import hashlib
import os
from pathlib import Path

SUMMARY = "checkpoint.json"  # of a checkpoint: its step, and size and SHA-256 of every other file


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Fingerprints: a few hexadecimal digits that tell whether weights, or data, are still the same."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

DIGITS = 16


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of named tensors: of names, shapes, types and numbers, wherever they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        a = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(a.shape)} {a.dtype}\n".encode())
        digest.update(a.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGITS]

"""Terminal Velocity Matching on images: a semi-Lipschitz DiT, its training, sampling and evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagenet.sampler import Generator, load_generator

__all__ = ["Generator", "load_generator"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: `import imagenet` itself loads nothing."""
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("imagenet.sampler"), name)
    raise AttributeError(f"module 'imagenet' has no attribute {name!r}")

"""Names of classes: of the folder of pictures that a model learned from, ImageNet's, CIFAR-10's, and of the digits."""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from imagenet.config import Config
from tvm_ref.cli.errors import UserError

IMAGENET = 1000  # classes: as many without names are taken to be those of ImageNet, in its usual order
WORDNET = re.compile(r"n\d{8}")  # how ImageNet names its folders
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def class_names(config: Config, own: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of a model's classes, in their order.

    Args:
        config: of the model.
        own: names that the model's data gave to its classes, if they did.

    Raises:
        UserError: classes that have no names here, or no torchvision, which knows those of ImageNet.
    """
    if own is not None and not (len(own) == IMAGENET and all(map(WORDNET.fullmatch, own))):
        return tuple(own)
    if config.data == "digits":
        return tuple(map(str, range(config.classes)))
    if config.data == "cifar10":
        return CIFAR10
    if config.classes == IMAGENET:
        return _imagenet_names()
    raise UserError(f"the {config.classes} classes of this model have no names: say --classes by numbers")


def class_number(name: str | int, config: Config, own: Sequence[str] | None = None) -> int:
    """Return the number of a class that is given by its name, in any case of letters, or by its number.

    Args:
        name: its name or number.
        config: of the model.
        own: see class_names.

    Raises:
        UserError: no such class, with the names closest to it.
    """
    if isinstance(name, int) or name.removeprefix("-").isdecimal():
        number = int(name)
        if not 0 <= number < config.classes:
            raise UserError(f"--classes must lie in 0 to {config.classes - 1}, got {number}")
        return number
    names = [known.lower() for known in class_names(config, own)]
    if name.lower() in names:
        return names.index(name.lower())
    close = difflib.get_close_matches(name.lower(), names, cutoff=0.5)
    close += [known for known in names if name.lower() in known.split() and known not in close]
    hint = f"; close are {', '.join(close[:5])}" if close else ""
    raise UserError(f"--classes: no class is named {name!r}{hint}")


def _imagenet_names() -> tuple[str, ...]:
    """Read torchvision's list from its one file; all of torchvision takes seconds, and fails with another PyTorch."""
    package = importlib.util.find_spec("torchvision")
    folders = None if package is None else package.submodule_search_locations
    for folder in folders or ():
        spec = importlib.util.spec_from_file_location("imagenet_names", Path(folder) / "models" / "_meta.py")
        if spec is not None and spec.loader is not None and spec.origin is not None and Path(spec.origin).is_file():
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            names = tuple(getattr(module, "_IMAGENET_CATEGORIES", ()))
            if len(names) == IMAGENET:
                return names
    raise UserError("names of ImageNet's classes need torchvision: pip install -e '.[imagenet]'; or say numbers")

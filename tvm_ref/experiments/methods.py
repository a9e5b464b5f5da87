"""The methods that compare.py compares, by name, and what is swept in addition to the learning rate."""

from collections.abc import Iterable
from typing import Any

from tvm_ref.objectives import OBJECTIVES

METHODS: dict[str, dict[str, Any]] = {
    "TVM": {},
    "TVM, noise 1/4": {"noise_share": 0.25},
    "TVM, JVP detached": {"settings": {"detach_jvp": True}},
    **{kind.method.title: {"objective": key} for key, kind in OBJECTIVES.items() if key != "tvm"},
    "LSD, EMA target": {"objective": "lsd", "target_ema": 0.99},
}
# what is swept in addition to the rate; the first is the method's default
SETTINGS = {kind.method.title: kind.method.sweeps for kind in OBJECTIVES.values()}


def named(name: str, setting: dict[str, Any]) -> str:
    """Name a method, if it is given, with its setting."""
    options = setting.get("settings", {}) | {key: value for key, value in setting.items() if key != "settings"}
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()]
    return ", ".join([name, *words] if name else words)


def family_of(methods: Iterable[str]) -> dict[str, str]:
    """Name the family of each method, its identity of the flow map: the file that holds the objective."""
    return {name: OBJECTIVES[METHODS[name].get("objective", "tvm")].__module__ for name in methods}


def method_named(text: str) -> str:
    """Find a method by its name, or by its objective's name as in the toy's --objective."""
    plain = {
        options.get("objective", "tvm"): name for name, options in METHODS.items() if not {*options} - {"objective"}
    }
    return plain.get(text, text)

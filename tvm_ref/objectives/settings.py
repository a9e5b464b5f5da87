"""An objective and its settings in words, as command lines have them: power=0, or stops='none',learned_weight=True."""

import ast
import inspect
from typing import Any

from tvm_ref.objectives import OBJECTIVES, Objective
from tvm_ref.objectives.base import Flow


def make_objective(
    key: str, flow_map: Flow, settings: str = "", *, null_label: int | None = None, detach_jvp: bool = False
) -> Objective:
    """Make an objective with its settings.

    Args:
        key: of OBJECTIVES.
        flow_map: what it trains.
        settings: NAME=VALUE,... of the keywords of its class, besides those here; values are literals of Python.
        null_label: see Objective.
        detach_jvp: TVM and PID alone (paper, sec. 7.4).

    Raises:
        ValueError: settings that cannot be read, or that the objective does not have; what it raises itself.
    """
    kind = OBJECTIVES[key]
    try:
        call = ast.parse(f"dict({settings})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(settings)
        options: dict[str, Any] = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of a hostile file
        raise ValueError(f"--settings must read NAME=VALUE,...; got {settings[:80]!r}") from None
    known = [name for name in inspect.signature(kind).parameters if name not in ("flow_map", "null_label")]
    for name in options:
        if name not in known:
            raise ValueError(f"--objective {key} has no setting {name!r}; it has {', '.join(known) or 'none'}")
    if detach_jvp:
        if "detach_jvp" not in known:
            raise ValueError(f"--detach-jvp does nothing for --objective {key}")
        options["detach_jvp"] = True
    if null_label is not None and not kind.has_guidance:
        raise ValueError(f"--objective {key} has no guidance here: it goes with --w 1")
    try:
        return kind(flow_map, null_label=null_label, **options)
    except TypeError as error:
        raise ValueError(f"--settings: {error}") from None

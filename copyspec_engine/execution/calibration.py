"""Measured costs of a forward pass, kept on disk for each model, device and dtype, so that loading need not measure.

A kept curve is compared with a quick measurement whenever it is used, so that one that was measured on a busy machine
does not stay for ever. Nothing fails because of the disk: what cannot be read is measured anew, what cannot be written
is not kept, and both are logged as warnings that name the file.

Not covered: measuring itself (pass_cost.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from copyspec_engine.drafting.cost import Points
from copyspec_engine.models.store import write_whole
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.folders import step_cost_folder

__all__ = ["KeptCurve", "PassCost", "cpu_name", "keep", "kept_curves", "kept_or_measured"]

logger = logging.getLogger(__name__)

_FORMAT = 2
_WIDEST_CHECK = 64
_LONGEST_CHECK_S = 0.5
_MOST_DIFFERENCE = 1.5


@dataclass(frozen=True, slots=True)
class PassCost:
    """What passes take, and which of them are narrow ones (narrow_decoder.py)."""

    points: Points
    narrow_tokens: int = 0
    """Passes of up to so many tokens are narrow, as those were faster; >= 0."""


@dataclass(frozen=True, slots=True)
class KeptCurve:
    """A measured cost curve on disk."""

    path: Path
    facts: dict[str, str]
    """Everything that the cost depends on: model, device, dtype, versions."""
    cost: PassCost
    measured_at: str
    """Date and time, ISO 8601, UTC."""


def kept_or_measured(
    facts: Mapping[str, str], measure: Callable[[], PassCost], check: Callable[[tuple[int, ...], int], Points]
) -> PassCost:
    """The curve kept for exactly these facts if it still holds, else what `measure` gives, which is then kept.

    Args:
        facts: everything that the cost depends on; "model" also names the file.
        measure: measures a whole curve.
        check: measures passes of these numbers of tokens, quickly; its second argument is `PassCost.narrow_tokens`.
    """
    path = _path(facts)
    curve = _read(path)
    if curve is not None and curve.facts != dict(facts):
        logger.warning("Ignored the kept cost curve %s: it is of another model or machine", path)
    elif curve is not None and _still_holds(curve.cost, check):
        return curve.cost
    cost = measure()
    keep(facts, cost)
    return cost


def _still_holds(kept: PassCost, check: Callable[[tuple[int, ...], int], Points]) -> bool:
    """Whether a wide pass still costs about as many passes of one token as it did.

    Where even narrow passes are slow this is not checked: it would take as long as measuring anew.
    """
    costs = dict(kept.points)
    widths = [w for w, s in kept.points if 1 < w <= _WIDEST_CHECK and costs[1] + s <= _LONGEST_CHECK_S]
    if not widths:
        return True
    quick = dict(check((1, widths[-1]), kept.narrow_tokens))
    before, now = costs[widths[-1]] / costs[1], quick[widths[-1]] / quick[1]
    holds = max(before, now) <= _MOST_DIFFERENCE * min(before, now)
    if not holds:
        logger.info(
            "Measuring the cost of a pass anew: one of %d tokens took as long as %.1f of one token, and now as %.1f",
            widths[-1],
            before,
            now,
        )
    return holds


def keep(facts: Mapping[str, str], cost: PassCost) -> None:
    """Write a curve, whole or not at all."""
    path = _path(facts)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"format": _FORMAT, "facts": dict(facts), "measured_at": now}
    content |= {"points": cost.points, "narrow_tokens": cost.narrow_tokens}
    try:
        write_whole(path, json.dumps(content, indent=1))
    except OSError as error:
        logger.warning("Could not keep the measured cost curve in %s: %s", path, error)


def kept_curves() -> Iterator[KeptCurve]:
    """Every curve that is kept and can be read."""
    curves = (_read(path) for path in sorted(step_cost_folder().glob("*.json")))
    return (curve for curve in curves if curve is not None)


def _read(path: Path) -> KeptCurve | None:
    """The curve in a file; None if there is no such file, or, with a warning, if it cannot be used."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        points = EngineConfig(step_cost=content["points"]).points
        if points is None:
            raise ValueError("it has no points")
        cost = PassCost(points, int(content["narrow_tokens"]))
        return KeptCurve(path, dict(content["facts"]), cost, str(content["measured_at"]))
    except FileNotFoundError:
        return None
    except (ConfigError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("Ignored the kept cost curve %s: %s: %s", path, type(error).__name__, error)
        return None


def _path(facts: Mapping[str, str]) -> Path:
    """A file of its own for each set of facts, with a name that tells the model."""
    model = re.sub(r"[^A-Za-z0-9.-]+", "_", facts["model"]).strip("._")[-60:]
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
    return step_cost_folder() / f"{model}-{digest[:16]}.json"


def cpu_name() -> str:
    """The processor's model, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()

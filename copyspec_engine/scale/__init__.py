"""`copyspec scale`: several engines on one or more machines, as an application of Ray Serve.

May import: values, engine and serve. Nouns: `ScaleConfig`, `Slot`, `Route`, `Replica`, `Front`.

Ray Serve starts, watches, replaces and finds the replicas; here is only what it cannot know: which of them has a
conversation's memory. A replica holds a slot (`slots`), a call belongs to a conversation (`routes`), and each
conversation to a slot (`routing`, which `router` tells Ray): whoever comes or goes, no other's conversations move.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from copyspec_engine.values.errors import missing_extra

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build", "check_extra"]


def check_extra() -> None:
    """Raises CopySpecError unless the extra "scale" is installed."""
    for package in ("ray", "fastapi"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "scale")


def build(args: Mapping[str, Any]) -> Application:
    """The application, for `serve run copyspec_engine.scale:build model=smollm2 replicas=2` and Serve config files.

    Args:
        args: options of `ScaleConfig`, of the server and of its engine, by their names.

    Raises:
        ConfigError: an option is unknown or cannot be as it is, or others could reach the server without a key.
        CopySpecError: the extra "scale" is not installed.
    """
    check_extra()
    from copyspec_engine.scale.application import application_of
    from copyspec_engine.scale.options import split_options

    return application_of(*split_options(args))

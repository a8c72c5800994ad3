"""Options of an application, given together as a Serve config file has them, by whose they are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from copyspec_engine.scale.config import ScaleConfig
from copyspec_engine.serve.config import MAX_WAITING, ServeConfig
from copyspec_engine.serve.tenants import check_reachable
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.options import advice

if TYPE_CHECKING:
    from copyspec_engine.engine.engine import Engine

__all__ = ["NOT_OURS", "engine_maker", "split_options"]

NOT_OURS = {
    "port": "Ray's proxies listen: say it in http_options of the Serve config file, or to `copyspec scale up`",
    "drain_notice_s": "no calls are sent to a replica that is to end",
    "send_timeout_s": "Ray's proxies hold what a reader does not take",
}
"""Options of `ServeConfig` that mean nothing behind Ray's proxies, and why."""


def split_options(args: Mapping[str, Any]) -> tuple[ScaleConfig, ServeConfig, EngineConfig]:
    """Options that are given together, by whose they are.

    Raises:
        ConfigError: one is unknown, or cannot be as it is.
    """
    kinds: tuple[type[BaseModel], ...] = (ScaleConfig, ServeConfig, EngineConfig)
    for name in args:
        if name in NOT_OURS:
            raise ConfigError(
                f"Got {name}={args[name]!r} for several replicas but leave it out: {NOT_OURS[name]}", name
            )
        if not any(name in kind.model_fields for kind in kinds):
            raise ConfigError(f"Got unknown option {name}={args[name]!r}: {advice(name, ScaleConfig, kinds[1:])}", name)
    scale, serve, engine = ({name: args[name] for name in args if name in kind.model_fields} for kind in kinds)
    options = ScaleConfig(**scale), ServeConfig(**serve), EngineConfig(**{"max_waiting": MAX_WAITING, **engine})
    if 0 < options[0].num_gpus < 1 and options[2].kv_cache_tokens is None:
        raise ConfigError(
            f"Got num_gpus={options[0].num_gpus} without kv_cache_tokens, so that the first replica on a GPU would "
            "take the room of the others: say how many tokens each may keep",
            "kv_cache_tokens",
        )
    check_reachable(options[1])
    return options


def engine_maker(config: ScaleConfig) -> Callable[[EngineConfig], Engine]:
    """What makes the engine of a replica.

    Raises:
        ConfigError: there is no such function.
    """
    if config.engine is None:
        from copyspec_engine.engine.engine import Engine

        return Engine
    module, _, name = config.engine.partition(":")
    try:
        made: Callable[[EngineConfig], Engine] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"Got engine={config.engine!r} but there is no such function: {error}", "engine") from None
    return made

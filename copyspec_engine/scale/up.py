"""`copyspec scale up`: an application of several replicas, from a command to an exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copyspec_engine.scale import check_extra
from copyspec_engine.scale.options import split_options
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import INTERRUPTED, listen
from copyspec_engine.values.errors import ConfigError, CopySpecError

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["APPLICATION", "UpOptions", "prepare_ray", "reason_of", "run_up"]

APPLICATION = "copyspec"
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """How the application is run."""

    args: Mapping[str, Any]
    """Options of `build`."""
    port: int
    """Of Ray's proxies."""
    address: str | None = None
    """Of a running Ray cluster, "auto": the one of this machine; None: one begins, and ends with the command."""


def prepare_ray() -> None:
    """Say what Ray reads from the environment when it is imported, where nothing is said yet.

    It sends no reports to its makers, replicas are no less urgent than what else runs on the machine, and a proxy that
    has died is missed in seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")


def run_up(options: UpOptions, started: Callable[[str], None] = lambda _url: None) -> int:
    """Run the application until a signal; the exit code.

    Args:
        options: how.
        started: told the address, once the replicas are there.

    Raises:
        ConfigError: an option cannot be as it is, or the machine has less than the replicas are to use.
        CopySpecError: there is no such cluster, or the application does not start.
    """
    prepare_ray()
    check_extra()
    from copyspec_engine.scale.application import application_of

    scale, config, engine_config = split_options(options.args)
    application = application_of(scale, config, engine_config)
    with listen(config.model_copy(update={"port": ServeConfig(port=options.port).port})) as free:  # it has to be
        port = free.getsockname()[1]
    if options.address is not None:
        _check_address(options.address)
    import ray

    try:
        told = {"address": options.address} if options.address else {"include_dashboard": False}
        try:
            ray.init(**told)
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(options.address, error) from None
        for name, each in (("CPU", scale.num_cpus), ("GPU", scale.num_gpus)):
            there = ray.cluster_resources().get(name, 0)
            if each * scale.replicas > there:
                raise ConfigError(
                    f"Got replicas={scale.replicas} with num_{name.lower()}s={each} but there are {there:g}: lower one"
                )
        ended_by = _serve(application, {"host": config.host, "port": port}, options.address is not None, started)
    finally:
        ray.shutdown()
    return INTERRUPTED if ended_by == signal.SIGINT else 0


def _serve(
    application: Application, location: Mapping[str, Any], others_stay: bool, started: Callable[[str], None]
) -> int:
    """Run the application until a signal, and say which.

    Args:
        application: what runs.
        location: host and port of the proxies.
        others_stay: the cluster does not end with the application.
        started: see `run_up`.

    Raises:
        CopySpecError: it does not start.
    """
    from ray import serve

    signals: list[int] = []
    ended, is_starting = threading.Event(), True

    def stop(number: int, _frame: object) -> None:
        nonlocal is_starting
        signals.append(number)
        ended.set()
        was_starting, is_starting = is_starting, False
        if was_starting:
            raise KeyboardInterrupt  # large models take minutes, and Ray waits for them

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    has_begun, logs = True, {"enable_access_log": False}
    try:
        serve.start(http_options=dict(location), proxy_location="EveryNode", logging_config=logs)
        serve.run(application, name=APPLICATION, logging_config=logs)
        is_starting = False
    except RuntimeError as error:
        raise CopySpecError(f"The replicas do not start: {reason_of(serve.status()) or error}") from None
    except KeyboardInterrupt:
        has_begun = False
    if has_begun:
        started(f"http://{location['host']}:{location['port']}")
        ended.wait()
    if has_begun or others_stay:  # else all of it ends with Ray
        serve.delete(APPLICATION)
    return signals[0]


def _check_address(address: str) -> None:
    """Raises CopySpecError if nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> CopySpecError:
    return CopySpecError(f"Got address={address!r} but there is no such Ray cluster: {error}")


def reason_of(status: Any) -> str | None:  # noqa: ANN401 - Ray's
    """What a replica that did not start has raised, by the last line of its traceback."""
    told = "\n".join(found.message for found in status.applications[APPLICATION].deployments.values())
    raised = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .+$", told, flags=re.MULTILINE)
    return raised[-1].partition(": ")[2] if raised else None

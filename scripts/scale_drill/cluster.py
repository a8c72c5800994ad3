"""A Ray cluster of this process with an application on it, and ways to do it harm."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from copyspec_engine.scale.slots import tag_of
from copyspec_engine.scale.up import APPLICATION, prepare_ray

__all__ = ["Cluster", "wait_until"]

_MARK = "SCALE_DRILL_MARK"
_START_S = 300.0


def wait_until(text: str, holds: Callable[[], bool], within_s: float = 60.0) -> float:
    """Wait until something holds; the seconds that it took.

    Raises:
        TimeoutError: it does not within so many seconds; `text` says what was waited for.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise TimeoutError(f"waited {within_s:.0f} s in vain until {text}")
        time.sleep(0.05)
    return time.monotonic() - began


class Cluster:
    """Ray, Serve and one application, begun by this process alone; a context manager that ends them.

    Args:
        port: of the proxy.
        num_cpus: that Ray is told it has: what a drill starts need not have a processor each.
    """

    def __init__(self, port: int = 8700, num_cpus: int = 64) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port, self._num_cpus, self._mark = port, num_cpus, secrets.token_hex(8)
        self._args: Mapping[str, Any] = {}
        self._before: frozenset[int] = frozenset()

    def __enter__(self) -> Cluster:
        prepare_ray()
        os.environ[_MARK] = self._mark
        import ray
        from ray import serve

        ray.init(
            include_dashboard=False,
            num_cpus=self._num_cpus,
            object_store_memory=100_000_000,
            log_to_driver="SCALE_DRILL_LOG" in os.environ,
            logging_level="ERROR",
        )
        where = {"host": "127.0.0.1", "port": self._port}
        serve.start(http_options=where, proxy_location="HeadOnly", logging_config={"enable_access_log": False})
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def deploy(self, args: Mapping[str, Any], replicas: int, *, wait: bool = True) -> None:
        """Say what is to run, as a Serve config file does, and wait until it does.

        Args:
            args: of `copyspec_engine.scale:build`; where they are the same as before nothing is started anew.
            replicas: how many there are to be.
            wait: until all of them are there.
        """
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": APPLICATION,
            "import_path": "copyspec_engine.scale:build",
            "route_prefix": "/",
            "args": dict(args),
            "deployments": [{"name": "Replica", "num_replicas": replicas}],
            "logging_config": {"enable_access_log": False},
        }
        self._before = frozenset() if args == self._args else frozenset(self.replicas().values())
        self._args = args
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        if wait:
            self.wait_for(replicas)

    def wait_for(self, replicas: int) -> float:
        """Wait until so many replicas run, of what was deployed last, and no other; the seconds that it took."""

        def is_there() -> bool:
            from ray import serve

            told = serve.status().applications.get(APPLICATION)
            if told is None:
                return False
            if told.status == "DEPLOY_FAILED":
                raise RuntimeError(f"the application is {told.status}: {told.message} {told.deployments}")
            states = told.deployments["Replica"].replica_states if "Replica" in told.deployments else {}
            running = self.replicas()
            return (
                told.status == "RUNNING"
                and {state: number for state, number in states.items() if number} == {"RUNNING": replicas}
                and len(running) == replicas
                and not self._before & set(running.values())
            )

        return wait_until(f"{replicas} replicas run", is_there, _START_S)

    def replicas(self) -> dict[str, int]:
        """The processes of replicas by the tags of their slots, as their locks tell."""
        found = {}
        for process in self._processes("ray::ServeReplica:copyspec:Replica"):
            with contextlib.suppress(OSError):  # it may be gone by now
                for file in Path(f"/proc/{process}/fd").iterdir():
                    lock = Path(os.readlink(file))
                    if lock.suffix == ".lock" and "copyspec" in lock.parts:
                        found[tag_of(f"{os.uname().nodename}-{lock.stem}")] = process
        return found

    def fronts(self) -> list[int]:
        """The processes of fronts."""
        return list(self._processes("ray::ServeReplica:copyspec:Front"))

    def proxies(self) -> list[int]:
        """The processes of Ray's proxies."""
        return list(self._processes("ray::ProxyActor"))

    def _processes(self, title: str) -> Iterator[int]:
        """Those with a title that this cluster has begun."""
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                named = (folder / "cmdline").read_bytes().startswith(title.encode())
                if named and mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def kill(process: int) -> None:
    """SIGKILL."""
    os.kill(process, signal.SIGKILL)

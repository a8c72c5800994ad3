"""What a scaled server may be told beside what each of its replicas is told: how many, and what each may use."""

from __future__ import annotations

from pydantic import Field, field_validator

from copyspec_engine.values.options import Options

__all__ = ["ScaleConfig"]


class ScaleConfig(Options):
    """Options of an application of several replicas, beside those of each."""

    replicas: int = Field(default=1, ge=1)
    """Replicas, each with an engine of its own. A running application takes another number without a restart as
    `num_replicas` of the deployment `Replica` in the Serve config file."""
    direct: bool = False
    """Whether Ray's proxies ask the replicas themselves, rather than a front that knows what a call is. Chunks cost
    less then; but only what stands in headers and paths leads a call to its conversation, and the clients of a replica
    that dies see a broken connection."""
    fronts: int = Field(default=1, ge=1)
    """Fronts. The streams that go through one that dies are broken off."""
    num_cpus: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Processors of a replica, by which Ray chooses its machine; also its number of threads, where that is whole."""
    num_gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """GPUs of a replica. Those with a half each share one: give `kv_cache_tokens` then, by which both have room."""
    slots: str | None = Field(default=None, min_length=1)
    """A folder that all machines share, in which replicas lock the slots that they hold. Default: slots belong to their
    machine, and the conversations of one that is lost go to others."""
    load_factor: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """Times the mean of all replicas that one may have of calls in flight; beyond that, and beyond twice `max_running`,
    a call goes to the next slot, which has the conversation's texts only where `memory_path` is a database. Default: no
    bound, a conversation stays where it is."""
    stuck_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds for which one turn of the engine's loop may last before the replica ends itself and is replaced."""
    engine: str | None = Field(default=None, min_length=1)
    """MODULE:NAME of a function that makes the engine of an `EngineConfig`; default: `Engine`."""

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, path: str | None) -> str | None:
        if path is not None and not all(path.partition(":")):
            raise ValueError("MODULE:NAME of a function")
        return path

"""What every call may say besides its prompt: which model, whose conversation it is, and how the answer comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from copyspec_engine.serve.bodies import Body
from copyspec_engine.serve.conversations import SESSION_METADATA, Caller
from copyspec_engine.serve.errors import invalid
from copyspec_engine.serve.sampling import SamplingBody
from copyspec_engine.serve.service import Service

__all__ = ["CallBody", "CopySpecOptions", "ObfuscationOptions", "StreamOptions", "checked_number"]


class ObfuscationOptions(Body):
    """What the events of a stream have besides the answer."""

    include_obfuscation: bool | None = None
    """Each event has random letters, so that its length does not show how much was copied. Default: yes, but for
    clients on this machine."""


class StreamOptions(ObfuscationOptions):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    """A last chunk without choices has the counts of tokens."""


class CopySpecOptions(Body):
    """What this server alone can do; what was asked for comes back in an object of the same name."""

    segments: bool | None = None
    """Give the answer in pieces that were copied or not."""
    explain: bool | None = None
    """Say where each copied part came from, in messages and characters."""
    stats: bool | None = None
    """Give tokens per forward pass, the share that was copied, and times."""
    timeout_s: float | None = None
    """Seconds after which the answer ends with what is written by then, if the server's own limit is not shorter."""
    drafter: str | dict[str, Any] | None = None
    """Where drafts come from: "adaptive", "copyspec", "draft-model", "none", or such a name with its options, as
    {"name": "copyspec", "block": 5}."""


class CallBody(SamplingBody):
    """What a call says besides its prompt.

    Subclasses say in `names` how they call what the engine calls otherwise.
    """

    names: ClassVar[Mapping[str, str]] = {}

    model: str
    """A name of the model that GET /v1/models gives."""
    stream: bool | None = None
    """Send the answer as it is written."""
    stream_options: ObfuscationOptions | None = None
    prediction: str | dict[str, Any] | None = None
    """{"type": "content", "content": ...}: a text that the answer will repeat in large part."""
    session_id: str | None = None
    """The conversation, where no header names it."""
    metadata: dict[str, str] | None = None
    """"session_id", "thread_id" or "conversation_id" name the conversation, where nothing else does."""
    user: str | None = None
    safety_identifier: str | None = None
    """Whose talk this is: a conversation that nothing names goes on for him alone. Goes before `user`."""
    prompt_cache_key: str | None = None
    """Calls of one key share the KV of what their prompts have in common."""
    copyspec: CopySpecOptions | None = None

    def check(self, service: Service) -> None:
        """Refuse what cannot be done.

        Raises:
            ApiError: 400 which names the field, 404 for another model.
        """
        service.check_model(self.model)
        for name, instead in self.unsupported.items():
            if getattr(self, name) is not None and getattr(self, name) is not False:
                raise invalid(name, f"Got {name} but it is not supported: {instead}", "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "Got stream_options without stream: set stream to true, or leave it out")

    def ignored(self) -> list[str]:
        unread = [name for name in self.metadata or () if name not in SESSION_METADATA]
        is_read = self.metadata is not None and len(unread) < len(self.metadata)
        told = [f"metadata.{name}" for name in unread] if is_read else ["metadata"] if unread else []
        return [*super().ignored(), *told]

    @property
    def options(self) -> CopySpecOptions:
        """What was asked of this server alone."""
        return self.copyspec or CopySpecOptions()

    @property
    def include_obfuscation(self) -> bool | None:
        """Whether events are to hide their lengths; None: as the server holds it."""
        return None if self.stream_options is None else self.stream_options.include_obfuscation

    @property
    def partition(self) -> str | None:
        """See `Caller.talk`."""
        return self.safety_identifier or self.user

    def named(self, caller: Caller) -> str | None:
        """See `Caller.named`."""
        return caller.named({"session_id": self.session_id, "metadata": self.metadata})

    def request_options(self, service: Service) -> dict[str, Any]:
        """Options of `GenerationRequest` that are as the call says them."""
        return {
            "timeout_s": service.time_limit(self.options.timeout_s),
            "prediction": self.prediction,
            "drafter": self.options.drafter,
            "explain": bool(self.options.explain),
        }


def checked_number(name: str, number: int | None, service: Service, least: int = 1) -> int:
    """How many answers a call wants.

    Raises:
        ApiError: too many, or none.
    """
    most = service.config.max_n
    if number is not None and not least <= number <= most:
        raise invalid(name, f"Got {name}={number} but expected {least} to {most}")
    return least if number is None else number

"""What a server may be told: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress

from pydantic import Field, field_validator

from copyspec_engine.values.options import Options

__all__ = ["MAX_WAITING", "ServeConfig", "is_loopback"]

_SESSION_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "x-opencode-session")
MAX_WAITING = 64
"""Calls that may wait where nothing else is said: more would only wait for their clients to give up."""
_BYTES_PER_TOKEN = 32
"""Of an exported text, at most: the number of each token and the text that it stands for."""


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a name or address."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class ServeConfig(Options):
    """Options of a server beside those of its engine."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Name or address to listen on. Without keys only one of this machine itself."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0: any that is free."""
    model_name: str | None = Field(default=None, min_length=1)
    """What calls name the model; default: the engine's name for it, of a path its last part."""
    model_aliases: tuple[str, ...] = ()
    """Other names that calls may use for it."""
    api_keys: str | None = Field(default=None, min_length=1)
    """A file of lines `NAME SHA256`: who may ask, and the SHA-256 of his key in hex. Nobody but its owner may write it
    and nobody but his group read it; it is read again on SIGHUP, by several replicas whenever it changes. The variable
    COPYSPEC_API_KEY holds one more key, of "default". Without both, everyone who reaches the server may ask."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may say they are for (their Host header); "*": any. Default: where only this machine reaches
    the server the names of this machine, so that no web page does by a name of its own; else any."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may ask, as "https://chat.example.org"; default: none but the server's own."""
    session_headers: tuple[str, ...] = _SESSION_HEADERS
    """Headers by which some clients name their conversation, looked at behind X-Session-ID and X-Conversation-Id."""
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1024)
    """Bytes of a request's body."""
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds for which a body may have nothing more to give before its call is refused."""
    max_depth: int = Field(default=64, ge=4, le=100)
    """Lists and objects of a body in each other."""
    max_messages: int = Field(default=4096, ge=1)
    """Messages of a call."""
    max_tools: int = Field(default=256, ge=1)
    """Tools of a call."""
    max_n: int = Field(default=8, ge=1, le=128)
    """Choices of a call."""
    max_stop: int = Field(default=64, ge=1)
    """Stop texts of a call."""
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds after which an answer ends with what is written by then."""
    first_byte_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Seconds for which the status of a stream waits for the first token or error, so that what goes wrong at once has
    a status of its own."""
    ping_s: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    """Seconds of silence after which a stream has a comment, which keeps proxies from closing it."""
    delta_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds of silence after which a stream has an empty delta, for clients that wait for events and see no
    comments."""
    send_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds for which a reader may take nothing before its call is cancelled."""
    drain_notice_s: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    """Seconds after SIGTERM in which new calls are still answered, by 503, so that whoever spreads them notices."""
    drain_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds for calls in flight to come to their end, once no more are taken, before they are cut short."""
    max_in_flight: int | None = Field(default=None, ge=1)
    """Answers that one tenant may have written at a time, each choice being one; default: no limit but the engine's."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers of one tenant, as a mean; a whole minute's may come at once. Default: no limit."""
    max_states: int = Field(default=1024, ge=1)
    """Answers of one tenant by which a conversation that nobody names is found again."""
    vllm_metric_names: bool = False
    """Tell some metrics by vLLM's names besides, which routers in front of servers read."""
    max_kept: int = Field(default=256, ge=0)
    """Answers of one tenant that are kept to be explained; and as many responses and conversations of POST
    /v1/responses to go on from, each. Those that were not used for longest go first."""
    max_kept_tokens: int = Field(default=1_000_000, ge=0)
    """Tokens that each of these may hold, prompts included, at about 40 bytes each; 40 bytes of a
    call's body count as one besides."""
    page: bool = True
    """Whether GET / gives a page to talk on."""

    @field_validator("session_headers", "cors_origins", "allowed_hosts")
    @classmethod
    def _lower(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.lower().rstrip("/") for name in names)

    def largest_import(self, memory_tokens: int) -> int:
        """Bytes of a body with all that a conversation remembers, which may hold so many tokens."""
        return max(self.max_body_bytes, _BYTES_PER_TOKEN * memory_tokens)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

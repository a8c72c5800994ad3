"""Who asks: keys and the tenants they belong to, and how much each may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from copyspec_engine.adapters.conversations import ConversationFinder
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.kept import Answered, Kept, StoredConversation, StoredResponse
from copyspec_engine.values.errors import ConfigError

__all__ = ["DEFAULT_TENANT", "KEY_VARIABLE", "Tenant", "Tenants", "check_reachable", "given_key"]

DEFAULT_TENANT = "default"
KEY_VARIABLE = "COPYSPEC_API_KEY"
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+([0-9a-fA-F]{64})")


class Tenant:
    """Whoever holds the keys of one name: his conversations, and what he has asked of late. For one event loop.

    Args:
        name: without a slash, which parts it from the names of conversations.
        config: the limits.
        clock: seconds that only grow.
        tag: see `Tenants`.
    """

    def __init__(
        self, name: str, config: ServeConfig, clock: Callable[[], float] = time.monotonic, tag: str = ""
    ) -> None:
        self.name = name
        self.conversations = ConversationFinder(config.max_states, prefix=f"{name}/found-{tag}")
        self.answered: Kept[Answered] = Kept(config.max_kept, config.max_kept_tokens)
        """Calls by the ids of their answers, to be explained."""
        self.responses: Kept[StoredResponse] = Kept(config.max_kept, config.max_kept_tokens)
        self.named: Kept[StoredConversation] = Kept(config.max_kept, config.max_kept_tokens)
        """Conversations of POST /v1/conversations."""
        self.in_flight = 0
        """Answers that are being written."""
        self._config, self._clock = config, clock
        self._tokens_left = float(config.tokens_per_minute or 0)
        self._counted_at = clock()

    def forget(self, session_id: str, session: str) -> bool:
        """Keep nothing of a conversation, by its client's and the engine's name for it; False if nothing was kept."""
        dropped = self.answered.drop(lambda call: any(asked.session_id == session for asked in call.requests))
        dropped += self.responses.drop(lambda response: response.session == session)
        return self.named.pop(session_id) is not None or dropped > 0

    def take(self, number: int) -> None:
        """Begin a number of answers; `give_back` ends them.

        Raises:
            ApiError: 429, it would be more than the tenant may have.
        """
        most = self._config.max_in_flight
        if most is not None and self.in_flight + number > most:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"Got {number} answers to write while {self.in_flight} are being written but one key may have {most} "
                "at a time: wait for one of them",
                retry_after_s=1.0,
            )
        self._refill()
        per_minute = self._config.tokens_per_minute
        if per_minute is not None and self._tokens_left <= 0:
            wait_s = (1 - self._tokens_left) * 60 / per_minute
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"Got a call beyond {per_minute} tokens a minute, which one key may use: wait {wait_s:.0f} seconds",
                kind="tokens",
                retry_after_s=wait_s,
            )
        self.in_flight += number

    def give_back(self, number: int) -> None:
        """A number of answers are over."""
        self.in_flight -= number

    def charge(self, num_tokens: int) -> None:
        """Count tokens that were read or written."""
        self._refill()
        self._tokens_left -= num_tokens

    def _refill(self) -> None:
        now, per_minute = self._clock(), self._config.tokens_per_minute or 0
        self._tokens_left = min(self._tokens_left + (now - self._counted_at) * per_minute / 60, float(per_minute))
        self._counted_at = now


class Tenants:
    """All tenants, by their keys. For one event loop.

    Args:
        config: the file of keys, and the limits.
        environment: where `KEY_VARIABLE` is looked up; default: the process's.
        tag: what ids of conversations that are found begin with, in hex: where there are several servers, which it was.

    Raises:
        ConfigError: the file cannot be read, others may write it, or a line is none.
    """

    def __init__(self, config: ServeConfig, environment: Mapping[str, str] | None = None, tag: str = "") -> None:
        self._config, self._tag = config, tag
        self._environment = os.environ if environment is None else environment
        self._tenants: dict[str, Tenant] = {}
        self._stamp = _stamp_of(config)
        self._keys = self._read()

    @property
    def is_open(self) -> bool:
        """There are no keys: everyone may ask."""
        return not self._keys

    def reread(self) -> None:
        """Read the keys again. Raises as the constructor does, and then the keys stay as they were."""
        self._keys = self._read()

    def reread_if_changed(self) -> bool:
        """Read the keys again if their file was changed; whether it was. Raises as `reread` does, once a change."""
        stamp, before = _stamp_of(self._config), self._stamp
        if stamp == before:
            return False
        self._stamp = stamp
        self.reread()
        return True

    def of_key(self, key: str | None) -> Tenant | None:
        """The tenant of a key; None: it is nobody's. Takes as long for a wrong key as for a right one."""
        if self.is_open:
            return self.named(DEFAULT_TENANT)
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogatepass")).digest()
        found = None
        for name, known in self._keys:
            if hmac.compare_digest(digest, known):
                found = name
        return None if found is None or not key else self.named(found)

    def named(self, name: str) -> Tenant:
        """The tenant of a name."""
        if name not in self._tenants:
            self._tenants[name] = Tenant(name, self._config, tag=self._tag)
        return self._tenants[name]

    def _read(self) -> tuple[tuple[str, bytes], ...]:
        keys = []
        own = self._environment.get(KEY_VARIABLE)
        if own:
            keys.append((DEFAULT_TENANT, hashlib.sha256(own.encode()).digest()))
        if self._config.api_keys is not None:
            keys += _keys_of(Path(os.path.expanduser(self._config.api_keys)))
        return tuple(keys)


def check_reachable(config: ServeConfig) -> None:
    """Raises ConfigError if others could reach the server without a key, or the keys cannot be read."""
    if Tenants(config).is_open and not config.is_local:
        raise ConfigError(
            f"Got host={config.host!r}, which other machines reach, without any key: set api_keys (--api-keys FILE) "
            f"or {KEY_VARIABLE}, or use host 127.0.0.1",
            "host",
        )


def given_key(headers: Mapping[str, str]) -> str:
    """The key that a request comes with, by its headers, their names in lower case; empty: none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _stamp_of(config: ServeConfig) -> tuple[int, int, int] | None:
    """What is another one when the file of keys was changed."""
    if config.api_keys is None:
        return None
    try:
        found = os.stat(os.path.expanduser(config.api_keys))
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _keys_of(path: Path) -> list[tuple[str, bytes]]:
    """The lines of a file of keys."""
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Got api_keys={str(path)!r} but it cannot be read: {error}") from None
    if mode & (stat.S_IWGRP | stat.S_IRWXO):
        raise ConfigError(
            f"Got api_keys={str(path)!r} with mode {stat.S_IMODE(mode):o}, so that others may read or change who may "
            f"ask: run chmod 600 {path}"
        )
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        found = _LINE.fullmatch(said)
        if said and found is None:
            raise ConfigError(
                f"Got line {number} of {str(path)!r} but expected a name of letters, digits, '.', '_' and '-', and the "
                "SHA-256 of a key in hex, as: echo \"ann $(printf %s KEY | sha256sum | cut -d' ' -f1)\""
            )
        if found is not None:
            keys.append((found[1], bytes.fromhex(found[2])))
    if not keys:
        raise ConfigError(f"Got api_keys={str(path)!r} without a single key: add a line, or leave it out")
    return keys

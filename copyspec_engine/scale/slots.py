"""Slots: the stable names of replicas.

A replica's own id is another one after each restart. So it takes the first slot that none has, by a lock that the
system takes back however it ends; the one in its place takes the same slot.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

from copyspec_engine.values.errors import ConfigError

__all__ = ["Slot", "tag_of"]

_LOOK_S = 0.1
_TAG_BYTES = 4


class Slot:
    """A slot that this process holds until it ends, or `release`.

    Args:
        folder: of the locks; it is made if there is none.
        num_slots: of the slots that are to be taken before any other.
        wait_s: seconds to wait while others have all of these: one that is on its way out may still hold its own.
        prefix: of its name.

    Raises:
        ConfigError: the folder cannot be had.
    """

    def __init__(self, folder: Path, num_slots: int = 1, wait_s: float = 0.0, prefix: str = "") -> None:
        until_s = time.monotonic() + wait_s
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                number = 0
                while (taken := _lock(folder / f"{number}.lock")) is None:
                    number += 1
                if number < num_slots or time.monotonic() >= until_s:
                    break
                os.close(taken)
                time.sleep(_LOOK_S)
        except OSError as error:
            raise ConfigError(f"Got slots={str(folder)!r} but no slot can be locked there: {error}", "slots") from None
        self.name = f"{prefix}{number}"
        self._file = taken

    def release(self) -> None:
        """Let the slot go."""
        os.close(self._file)


def _lock(path: Path) -> int | None:
    """An open file that this process alone has locked; None: another one has."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return file


def tag_of(slot: str) -> str:
    """What ids that are made in a slot begin with: eight letters, by which its replica is found again."""
    return hashlib.blake2b(slot.encode(), digest_size=_TAG_BYTES).hexdigest()

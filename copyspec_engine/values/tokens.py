"""What all rooms say about token ids: arrays of them, and what gives them their meaning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

__all__ = ["Fingerprint", "TokenArray"]

TokenArray = npt.NDArray[np.int64]
"""Token ids, or the KV slots of tokens, shape (n,)."""


@dataclass(frozen=True)
class Fingerprint:
    """Hex digests of what gives a memory's token ids their meaning."""

    tokenizer: str
    template: str

    @classmethod
    def of(cls, tokenizer: object, template: object) -> Fingerprint:
        """The digests of two values that JSON can hold."""
        dumps = (json.dumps(value, sort_keys=True) for value in (tokenizer, template))
        return cls(*(blake2b(text.encode(), digest_size=16).hexdigest() for text in dumps))

"""What a checkpoint's generation_config.json says of calls that do not say otherwise, as `generate` understands it.

A file that does not say `do_sample: true` asks for greedy decoding, whatever its temperature; its filters then hold for
calls that name a temperature. What the file sets and this engine does not do is named in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from copyspec_engine.values.config import SamplingParams
from copyspec_engine.values.errors import ConfigError

__all__ = ["GenerationDefaults", "read_defaults"]

logger = logging.getLogger(__name__)

_OPTIONS = {
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "bad_words_ids": "bad_words",
    "min_new_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
}
"""The file's names, and ours."""
_OFF = {"top_k": 0, "max_new_tokens": 0}
"""Values that stand for nothing at all."""
_NOT_DONE = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "force_words_ids": None,
    "constraints": None,
    "dola_layers": None,
    "watermarking_config": None,
    "max_time": None,
    "token_healing": False,
}
"""What `generate` knows and this engine does not, with the value that changes nothing."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The checkpoint's own options."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Those in `model_fields_set`."""
    min_length: int = 0
    """Tokens of prompt and answer before which the answer does not end; where there is no min_tokens."""
    max_length: int | None = None
    """Tokens of prompt and answer at which the answer ends; where there is no max_tokens."""
    not_done: tuple[str, ...] = ()
    """What the file says and is not done, as "num_beams=4"."""

    @property
    def options(self) -> dict[str, Any]:
        """What is set, by name."""
        lengths = {"min_length": self.min_length, "max_length": self.max_length}
        return _said(self.sampling) | {name: value for name, value in lengths.items() if value}

    def applied(self, params: SamplingParams, num_prompt_tokens: int, room: int) -> SamplingParams:
        """The options of a call, with ours where it says nothing.

        Args:
            params: the call's.
            num_prompt_tokens: of its prompt.
            room: tokens that an answer may have at most; ours are never more.
        """
        own, said = _said(self.sampling), _said(params)
        most = own.pop("max_tokens", 0) or max((self.max_length or 0) - num_prompt_tokens, 0)
        if most:
            own["max_tokens"] = max(min(most, room), said.get("min_tokens", 0), 1)
        merged = own | said
        if "min_tokens" not in said:
            least = own.get("min_tokens", self.min_length - num_prompt_tokens)
            merged["min_tokens"] = max(min(least, merged.get("max_tokens") or least), 0)
        return SamplingParams(**merged)


def _said(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in sorted(params.model_fields_set)}


def read_defaults(generation_config: object, name: str, vocab_size: int) -> GenerationDefaults:
    """The defaults in a transformers `GenerationConfig`.

    Args:
        generation_config: of the model; None: there is none.
        name: the model's, for the warning.
        vocab_size: token ids from here on cannot come, and are left out.
    """
    options: dict[str, Any] = {}
    not_done = [f"{key}={value!r}" for key, value in _not_done(generation_config)]
    for key, option, value in _given(generation_config, vocab_size):
        if _is_possible(option, value):
            options[option] = value
        else:
            not_done.append(f"{key}={getattr(generation_config, key)!r}")
    lengths = {}
    for key in ("min_length", "max_length"):
        value = getattr(generation_config, key, None)
        if value and not (type(value) is int and value > 0):
            not_done.append(f"{key}={value!r}")
        elif value:
            lengths[key] = value
    if not_done:
        logger.warning(
            "%s: its generation_config.json sets %s, which is not done here: set EngineConfig(generation_config="
            '"ignore") to do without all of it',
            name,
            ", ".join(not_done),
        )
    return GenerationDefaults(SamplingParams(**options), not_done=tuple(not_done), **lengths)


def _given(source: object, vocab_size: int) -> Iterator[tuple[str, str, Any]]:
    """What the file sets of what is done here: its name for it, ours, and the value."""
    if getattr(source, "do_sample", None):
        temperature = getattr(source, "temperature", None)
        yield "temperature", "temperature", 1.0 if temperature is None else temperature
    for key, option in _OPTIONS.items():
        value = getattr(source, key, None)
        if value is None or (key in _OFF and value == _OFF[key]):
            continue
        yield key, option, _known(value, vocab_size) if isinstance(value, list) else value


def _known(values: list[Any], vocab_size: int) -> list[Any]:
    """Of token ids, or runs of them, those that can come."""

    def is_known(token: object) -> bool:
        return not isinstance(token, int) or 0 <= token < vocab_size

    return [value for value in values if (all(map(is_known, value)) if isinstance(value, list) else is_known(value))]


def _is_possible(option: str, value: object) -> bool:
    try:
        SamplingParams(**{option: value})
    except ConfigError:
        return False
    return True


def _not_done(source: object) -> Iterator[tuple[str, Any]]:
    for key, neutral in _NOT_DONE.items():
        value = getattr(source, key, None)
        if value is not None and value != neutral:
            yield key, value

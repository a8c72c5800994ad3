"""Bodies of Ollama's API, and what they ask in the engine's terms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from copyspec_engine.serve.bodies import Body
from copyspec_engine.serve.chat import json_grammar
from copyspec_engine.serve.errors import ApiError, invalid, not_found
from copyspec_engine.serve.messages import checked_messages, checked_tools
from copyspec_engine.serve.sampling import Texts
from copyspec_engine.serve.service import Service
from copyspec_engine.values.config import SamplingParams
from copyspec_engine.values.grammar import Grammar

__all__ = ["OllamaBody", "OllamaChatBody", "OllamaGenerateBody", "OllamaOptions", "check_ollama_model"]

LATEST = ":latest"
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's, each for calls that say nothing of it to a model whose checkpoint says nothing of it either: with Ollama,
too, what belongs to a model goes before what holds for all. Its other defaults change nothing, and neither do ours."""
_SAME = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "stop")
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""With the values that change nothing."""
_NOT_DONE = {"typical_p": 1.0, "tfs_z": 1.0, "mirostat": 0}
"""Ways of choosing tokens that the engine does not have, with the values that change nothing."""
_DURATION = re.compile(r"[-+]?(0|((\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)")


def check_ollama_model(name: str, service: Service) -> None:
    """Refuse calls of other models; the tag "latest" may be said or not.

    Raises:
        ApiError: 404, it is none of ours.
    """
    if name not in service.models and name.removesuffix(LATEST) not in service.models:
        known = ", ".join(service.models)
        raise not_found(f"model {name!r} not found: this server has {known}", "model_not_found", "model")


class OllamaOptions(Body):
    """How tokens are chosen, by Ollama's names, and what it tells its own runner."""

    told_by = (SamplingParams,)
    without_effect: ClassVar[tuple[str, ...]] = (
        *("num_keep", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict", "numa"),
        *("low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "embedding_only"),
        *("mirostat_tau", "mirostat_eta", "penalize_newline"),
    )

    temperature: float | None = None
    """0 is greedy decoding. Default: the checkpoint's own, else 0.8 as Ollama has it."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; 0 or less: all. Default: the checkpoint's own, else 40 as Ollama has
    it."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities reach this sum. Default: the checkpoint's own, else 0.9 as Ollama has
    it."""
    min_p: float | None = None
    seed: int | None = None
    """The same seed gives the same answer; -1, the default: a fresh one."""
    stop: Texts | None = None
    num_predict: int | None = None
    """Most tokens to generate; less than 0, the default: up to the end of the context."""
    repeat_penalty: float | None = Field(default=None, ge=1e-6, le=1e6)
    """`repetition_penalty`: of all tokens in prompt and answer."""
    repeat_last_n: int | None = Field(default=None, ge=-1)
    """How far back penalties look: -1, the default here: as far as they can; 0: there are none. Other windows are
    refused where they would change the answer."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = Field(default=None, ge=1)
    """Tokens of the context. It is as the server was started, and a prompt that does not fit is refused, never cut."""
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None
    num_keep: int | None = None
    draft_num_predict: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None

    def names_without_effect(self, service: Service) -> list[str]:
        """Options that were given, and change nothing."""
        names = [name for name in self.without_effect if getattr(self, name) is not None]
        if self.num_ctx not in (None, service.info.max_model_len):
            names.append("num_ctx")
        return [f"options.{name}" for name in names]

    def sampling(self, service: Service, *, logprobs: bool | None, top_logprobs: int | None) -> SamplingParams:
        """The options for the engine.

        Raises:
            ApiError: one of them asks for what the engine does not have.
            ConfigError: a value is out of range.
        """
        self._check(service)
        own = service.info.sampling_defaults
        chosen: dict[str, Any] = {name: default for name, default in _DEFAULTS.items() if name not in own}
        chosen |= {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        chosen |= {"logprobs": bool(logprobs), "top_logprobs": top_logprobs or 0}
        if self.top_k is not None and self.top_k <= 0:
            chosen["top_k"] = None
        if self.seed not in (None, -1):
            chosen["seed"] = self.seed
        if self.num_predict is not None:
            chosen["max_tokens"] = None if self.num_predict < 0 else self.num_predict
        if self.repeat_penalty is not None:
            chosen["repetition_penalty"] = self.repeat_penalty
        self._check_window(service, own | chosen)
        return SamplingParams(**(chosen | (_PENALTIES if self.repeat_last_n == 0 else {})))

    def _check(self, service: Service) -> None:
        for name, neutral in _NOT_DONE.items():
            value = getattr(self, name)
            if value not in (None, neutral):
                raise invalid(
                    f"options.{name}",
                    f"Got options.{name}={value} but expected {neutral}: of what narrows sampling there are top_k, "
                    "top_p and min_p",
                    "unsupported_value",
                )
        if self.num_predict == 0:
            raise invalid("options.num_predict", "Got options.num_predict=0 but expected at least 1, or -1: no limit")
        most = service.config.max_stop
        if self.stop is not None and len(self.stop) > most:
            raise invalid(
                "options.stop", f"Got {len(self.stop)} stop texts but expected {most} at most", "array_too_long"
            )

    def _check_window(self, service: Service, chosen: Mapping[str, Any]) -> None:
        window = self.repeat_last_n
        penalised = any(chosen.get(name, neutral) != neutral for name, neutral in _PENALTIES.items())
        if window is not None and 0 < window < service.info.max_model_len and penalised:
            raise invalid(
                "options.repeat_last_n",
                f"Got options.repeat_last_n={window} with a penalty but expected -1, all tokens, or 0, no penalty",
                "unsupported_value",
            )


class OllamaBody(Body):
    """What both ways of asking have."""

    model: str
    """A name of the model that GET /api/tags gives, with or without the tag "latest"."""
    stream: bool | None = None
    """Send the answer as it is written, in lines of JSON; default: yes."""
    format: str | dict[str, Any] | None = None
    """"json", or the JSON schema of the answer."""
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    """Whether the model reasons before it answers, or how much; default: as its chat template has it."""
    keep_alive: float | str | None = None
    """Seconds, or a duration as "5m", for which Ollama keeps a model. This server keeps its own until it ends."""
    truncate: bool | None = None
    shift: bool | None = None
    """True, Ollama's default, cuts what does not fit the context. Here that is refused, as by false."""
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def asks(self) -> bool:
        """Whether there is anything to answer; else the call is about the model's being loaded."""
        raise NotImplementedError

    def check(self, service: Service) -> None:
        """Refuse what cannot be done.

        Raises:
            ApiError: 400 which names the field, 404 for another model.
        """
        check_ollama_model(self.model, service)
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise invalid("format", f"Got format={self.format!r} but expected 'json' or a JSON schema")
        if self.think and not service.engine.chat_format.reasons:
            raise invalid(
                "think", f"Got think={self.think!r} but {service.model} does not support thinking: leave it out"
            )
        if isinstance(self.keep_alive, str) and not _DURATION.fullmatch(self.keep_alive):
            raise invalid(
                "keep_alive",
                f"Got keep_alive={self.keep_alive!r} but expected seconds, or a duration as '5m' or '1h30m'",
            )
        if not self.asks and self._unloads:
            raise invalid(
                "keep_alive",
                f"Got keep_alive={self.keep_alive!r} without anything to answer, which unloads a model, but this "
                "server keeps its own: stop the server to free its memory",
                "unsupported_value",
            )

    @property
    def _unloads(self) -> bool:
        if isinstance(self.keep_alive, str):
            return not re.search(r"[1-9]", self.keep_alive)
        return self.keep_alive == 0

    def sampling(self, service: Service) -> SamplingParams:
        """How tokens are chosen. Raises as `OllamaOptions.sampling` does."""
        options = self.options or OllamaOptions()
        return options.sampling(service, logprobs=self.logprobs, top_logprobs=self.top_logprobs)

    def answer(self) -> Grammar | None:
        """The form of the answer; None: it is free."""
        if self.format is None or self.format == "":
            return None
        return json_grammar() if isinstance(self.format, str) else json_grammar(self.format)

    def template_values(self) -> dict[str, Any]:
        """What the chat template reads besides messages and tools."""
        if self.think is None:
            return {}
        effort = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
        return {"enable_thinking": bool(self.think), **effort}

    def ignored_names(self, service: Service) -> list[str]:
        """Fields and options that were given, and change nothing."""
        names = [name for name in ("truncate", "shift") if getattr(self, name)]
        if self.keep_alive is not None:
            names.append("keep_alive")
        return [*names, *(self.options or OllamaOptions()).names_without_effect(service)]


class OllamaChatBody(OllamaBody):
    """The next message of a chat."""

    messages: list[dict[str, Any]] | None = None
    """The chat so far; none: nothing is answered."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""

    @property
    def asks(self) -> bool:
        return bool(self.messages)

    def checked(self, service: Service) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[str]]:
        """Messages and tools for the engine, and the names of fields that change nothing.

        Raises:
            ApiError: one of them is none.
        """
        messages, ignored = checked_messages(_as_openai(self.messages or ()), service.config)
        tools, _ = checked_tools([{"type": "function", **tool} for tool in self.tools or ()], service.config)
        return messages, tools or None, [*self.ignored_names(service), *ignored]


class OllamaGenerateBody(OllamaBody):
    """An answer to one prompt."""

    prompt: str | None = None
    """What is asked; none: nothing is answered."""
    system: str | None = None
    """A message to the model that stands before the prompt."""
    raw: bool | None = None
    """Go on with the prompt as it is, without a chat template."""
    context: list[int] | None = None
    """What an earlier answer has given: the token ids of all that was said before."""
    suffix: str | None = None
    template: str | None = None
    images: list[Any] | None = None

    @property
    def asks(self) -> bool:
        return bool(self.prompt)

    def check(self, service: Service) -> None:
        super().check(service)
        if self.suffix:
            raise invalid(
                "suffix",
                "Got suffix but the model only goes on with a text: leave it out, or ask for the middle in the prompt",
                "unsupported_parameter",
            )
        if self.template:
            raise invalid(
                "template",
                "Got template but a server has one template: start it with chat_template, or use raw with a prompt "
                "that is laid out already",
                "unsupported_parameter",
            )
        refuse_images("images", self.images)
        beside = next((name for name in ("system", "context") if self.raw and getattr(self, name)), None)
        if beside is not None:
            raise invalid(beside, f"Got {beside} with raw but expected one of them: write it into the prompt")

    def ignored_names(self, service: Service) -> list[str]:
        names = super().ignored_names(service)
        return [*names, "think"] if self.raw and self.think is not None else names

    def messages(self) -> list[dict[str, Any]]:
        """What is asked as a chat."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.prompt}]


def refuse_images(where: str, images: object) -> None:
    """Raises ApiError where there are any."""
    if images:
        raise ApiError(
            400,
            "unsupported_content",
            f"Got {where} but the model reads text only: leave them out, or describe them in words",
            where,
        )


def _as_openai(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, where calls have ids by which results name them. What is none of Ollama's stays."""
    waiting: dict[str, str] = {}
    """The ids of calls without a result so far, and the names of their functions."""
    return [_message(at, message, waiting) for at, message in enumerate(messages)]


def _message(at: int, message: Mapping[str, Any], waiting: dict[str, str]) -> dict[str, Any]:
    where = f"messages[{at}]"
    given = {name: value for name, value in message.items() if value is not None}
    refuse_images(f"{where}.images", given.pop("images", None))
    ready = {"content": "", **given}
    if isinstance(given.get("role"), str):
        ready["role"] = given["role"].lower()
    if "thinking" in given:
        ready["reasoning_content"] = ready.pop("thinking")
    if given.get("tool_calls"):
        ready["tool_calls"] = _calls(f"{where}.tool_calls", given["tool_calls"], f"call_{at}", waiting)
    else:
        ready.pop("tool_calls", None)
    if ready.get("role") == "tool":
        name = ready.pop("tool_name", None)
        if isinstance(name, str) and name:
            ready["name"] = name
        ready["tool_call_id"] = _answered(given.get("tool_call_id"), name, waiting) or f"call_{at}"
    return ready


def _calls(where: str, calls: object, prefix: str, waiting: dict[str, str]) -> list[dict[str, Any]]:
    """Calls with their arguments as text, and with ids."""
    if not isinstance(calls, list):
        raise invalid(where, f"Got {where}={calls!r} but expected a list of calls")
    ready = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (
            (function.get("name"), function.get("arguments", {})) if isinstance(function, dict) else (0, 0)
        )
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise invalid(
                f"{where}[{at}]",
                f'Got {where}[{at}]={call!r} but expected {{"function": {{"name": ..., "arguments": {{...}}}}}}',
            )
        call_id = call.get("id") or f"{prefix}_{at}"
        waiting[str(call_id)] = name
        written = json.dumps(arguments, ensure_ascii=False)
        ready.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": written}})
    return ready


def _answered(call_id: object, name: object, waiting: dict[str, str]) -> str | None:
    """The id of the call that a result is of: the one that it names, else the first that waits for one."""
    if isinstance(call_id, str) and call_id:
        waiting.pop(call_id, None)
        return call_id
    of_name = [known for known, called in waiting.items() if name in (None, "", called)]
    if not of_name:
        return None
    del waiting[of_name[0]]
    return of_name[0]

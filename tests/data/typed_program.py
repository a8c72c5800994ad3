"""What a user may write; tests/test_types.py has mypy read it."""

from collections.abc import Iterator

from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.llms import ChatMessage

from copyspec_engine import (
    AdaptiveDrafter,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
)
from langchain_copyspec import ChatCopySpec
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

config = EngineConfig(drafter="none")
adaptive = EngineConfig(model="bundled", drafter=AdaptiveDrafter(recycle=True), max_model_len=1024)
chat = ChatCopySpec(drafter="none")
chat_with = ChatCopySpec(model="bundled", engine=config, max_tokens=20, temperature=0.5, stop=["x"])
llm = CopySpec(drafter="none")
llm_with = CopySpec(model="bundled", engine=adaptive, session_id="a", max_tokens=20)
completion = CopySpecCompletion(model="bundled", drafter="none")


sampling = SamplingParams(stop=["\n\n"], stop_token_ids=[2], suppress_tokens=[3], begin_suppress_tokens=[4])


def answer(engine: Engine) -> str:
    request = GenerationRequest(prompt="a", sampling=SamplingParams(max_tokens=3, temperature=0.0), drafter="none")
    output: GenerationOutput = engine.generate(request)
    return output.text


def pieces(engine: Engine) -> Iterator[str]:
    for chunk in engine.stream(GenerationRequest(messages=[{"role": "user", "content": "Hi"}])):
        yield chunk.text


message: AIMessage = chat.invoke([HumanMessage("Hi")])
content: str | None = llm.chat([ChatMessage("Hi")]).message.content

EngineConfig(drafter="nothing")  # type: ignore[arg-type]
ChatCopySpec(drafter="nothing")  # type: ignore[arg-type]
CopySpec(drafter="nothing")  # type: ignore[arg-type]

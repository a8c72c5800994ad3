"""Agents on the scripted model: each kind runs with real tools over several turns, in one conversation, and copies."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, CodeActAgent, FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory, StaticMemoryBlock
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import create_async_engine

from copyspec_engine import Engine
from llama_index.llms.copyspec import CopySpec, conversation

MakeEngine = Callable[..., Engine]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LlamaIndex's workflows list pydantic's old names
    pytest.mark.filterwarnings("ignore:Skipping serialization of known unserializable key"),
]

PAGE = "".join(
    f"- rule {number}: {number * 7919 % 9973} boxes at most, {number * 31 % 97} of them blue\n" for number in range(9)
)


def read_page(name: str) -> str:
    """Reads a page."""
    return f"{name}\n{PAGE}"


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def call(tool: str, **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


async def with_and_without_drafts(make: Callable[[str], Engine], run: Callable[[CopySpec], Awaitable[Any]]) -> Any:
    """What `run` gives, the same with and without drafting; and drafting has saved passes."""
    results, rates = [], []
    for drafter in ("adaptive", "none"):
        engine = make(drafter)
        results.append(await run(CopySpec(engine=engine)))
        rates.append(engine.metrics().tokens_per_forward)
    assert results[0] == results[1]
    assert rates[0] > 1.5 * rates[1] == 1.5
    return results[0]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The conversation of every request that any engine gets."""
    seen: list[str | None] = []
    prepare = Engine._prepare

    def remember(engine: Engine, request: Any, *trace: Any) -> Any:
        seen.append(request.session_id)
        return prepare(engine, request, *trace)

    monkeypatch.setattr(Engine, "_prepare", remember)
    return seen


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_calls_tools_and_quotes_them(
    make_engine: MakeEngine, spy: list[str | None], streaming: bool
) -> None:
    replies = [f"{call('read_page', name='Rules')}\n{call('add', a=2, b=3)}", f"5, and:\n{PAGE}", f"Again:\n{PAGE}"]

    async def run(llm: CopySpec) -> list[str]:
        agent = FunctionAgent(tools=[read_page, add], llm=llm, streaming=streaming)
        context = Context(agent)
        return [str(await agent.run(question, ctx=context)) for question in ("What are the rules?", "Again?")]

    answers = await with_and_without_drafts(lambda drafter: make_engine(replies, drafter=drafter), run)
    assert answers == [f"5, and:\n{PAGE}", f"Again:\n{PAGE}"]
    assert len(spy) == 6
    assert len(set(spy)) == 2  # one conversation for each context


async def test_an_agents_stream_shows_text_and_whole_calls(make_engine: MakeEngine) -> None:
    agent = FunctionAgent(tools=[add], llm=CopySpec(engine=make_engine([call("add", a=1, b=2), "three"])))
    handler = agent.run("1 + 2?")
    parts = [event async for event in handler.stream_events() if isinstance(event, AgentStream)]
    assert str(await handler) == "three"
    assert "".join(part.delta for part in parts) == "three"
    assert {json.dumps(found.tool_kwargs) for part in parts for found in part.tool_calls} == {'{"a": 1, "b": 2}'}
    assert parts[-1].raw["usage"]["completion_tokens"] == len("three") + 1


async def test_an_agent_may_be_made_to_begin_with_a_tool(bundled: Engine) -> None:
    tool = FunctionTool.from_defaults(add, return_direct=True)
    agent = FunctionAgent(tools=[tool], llm=CopySpec(engine=bundled), initial_tool_choice="add")
    asked = 'Call this tool:\n{"name": "add", "arguments": {"a": 20, "b": 22}}'
    assert str(await agent.run(asked)) == "42"


async def test_a_react_agent_thinks_in_text(make_engine: MakeEngine) -> None:
    replies = [
        'Thought: I need to use a tool.\nAction: read_page\nAction Input: {"name": "Rules"}',
        f"Thought: I can answer without using any more tools.\nAnswer: {PAGE}",
    ]

    async def run(llm: CopySpec) -> str:
        return str(await ReActAgent(tools=[read_page], llm=llm).run("What are the rules?"))

    said = await with_and_without_drafts(lambda drafter: make_engine(replies, drafter=drafter), run)
    assert said == PAGE.strip()  # the agent strips it


async def test_a_codeact_agent_runs_what_it_writes(make_engine: MakeEngine) -> None:
    code = "total = 0\nfor number in range(10):\n    total += number\nprint(total)"
    replies = [
        f"I add them up.\n<execute>\n{code}\n</execute>",
        f"Once more.\n<execute>\n{code}\n</execute>",
        "It is 45, twice.",
    ]
    ran: list[str] = []

    async def execute(code: str) -> str:
        ran.append(code)
        return "45"

    async def run(llm: CopySpec) -> str:
        agent = CodeActAgent(code_execute_fn=execute, llm=llm, tools=[add])
        return str(await agent.run("The sum of 0 to 9?"))

    answer = await with_and_without_drafts(lambda drafter: make_engine(replies, drafter=drafter), run)
    assert answer == "It is 45, twice."
    assert ran == [code] * 4


async def test_agents_hand_over_to_each_other_in_one_conversation(
    make_engine: MakeEngine, spy: list[str | None]
) -> None:
    replies = [
        call("read_page", name="Rules"),
        f"{call('handoff', to_agent='writer', reason='write it up: ' + PAGE)}",
        f"# Rules\n{PAGE}",
    ]

    async def run(llm: CopySpec) -> str:
        reader = FunctionAgent(
            name="reader", description="reads", tools=[read_page], llm=llm, can_handoff_to=["writer"]
        )
        writer = FunctionAgent(name="writer", description="writes", tools=[], llm=llm)
        return str(await AgentWorkflow(agents=[reader, writer], root_agent="reader").run("Write up the rules."))

    answer = await with_and_without_drafts(lambda drafter: make_engine(replies, drafter=drafter), run)
    assert answer == f"# Rules\n{PAGE}"
    assert len(spy) == 6
    assert len(set(spy)) == 2


async def test_an_agents_result_may_have_a_class(make_engine: MakeEngine) -> None:
    class Total(BaseModel):
        total: int

    replies = [call("add", a=1, b=2), "three", '{"total": 3}']
    agent = FunctionAgent(tools=[add], llm=CopySpec(engine=make_engine(replies)), output_cls=Total)
    assert (await agent.run("1 + 2?")).structured_response == {"total": 3}


# Which conversation


async def test_a_context_that_was_saved_goes_on_in_its_conversation(
    make_engine: MakeEngine, spy: list[str | None]
) -> None:
    llm = CopySpec(engine=make_engine(["one", f"two:\n{PAGE}", f"three:\n{PAGE}"]))
    agent = FunctionAgent(tools=[add], llm=llm)
    context = Context(agent)
    await agent.run("1?", ctx=context)
    await agent.run("2?", ctx=context)
    restored = Context.from_dict(agent, json.loads(json.dumps(context.to_dict())))
    answer = await agent.run("3?", ctx=restored)
    assert len(spy) == 3
    assert len(set(spy)) == 1
    assert answer.raw["copyspec"]["tokens_per_forward"] > 5  # what the memory lost, the conversation still has


async def test_a_memory_with_an_id_is_the_conversation(make_engine: MakeEngine, spy: list[str | None]) -> None:
    database = create_async_engine("sqlite+aiosqlite:///:memory:")
    memory = Memory.from_defaults(
        session_id="ann",
        token_limit=900,
        chat_history_token_ratio=0.5,
        token_flush_size=200,
        async_engine=database,
        memory_blocks=[StaticMemoryBlock(name="facts", static_content=f"The rules are:\n{PAGE}", priority=0)],
    )
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return f"The rules:\n{PAGE}"

    llm = CopySpec(engine=make_engine(answer))
    agent = FunctionAgent(tools=[add], llm=llm)
    answers = [await agent.run(f"What are the rules? ({number})", memory=memory) for number in range(4)]
    await database.dispose()
    assert set(spy) == {"ann"}
    assert all("The rules are:" in prompt for prompt in prompts)
    assert "(0)" not in prompts[-1]  # flushed: the prefix broke, but the text stays a source
    assert all(answer.raw["copyspec"]["tokens_per_forward"] > 5 for answer in answers)


async def test_what_names_a_conversation_goes_before_the_agents_own(
    make_engine: MakeEngine, spy: list[str | None]
) -> None:
    agent = FunctionAgent(tools=[add], llm=CopySpec(engine=make_engine(lambda prompt: "yes"), session_id="field"))
    with instrument_tags({"session_id": "tag"}):
        await agent.run("hi")
        with conversation("block"):
            await agent.run("hi")
    assert spy == ["tag", "block"]
    await agent.run("hi")
    assert spy[-1] not in ("tag", "block", "field")


async def test_a_state_that_cannot_take_the_conversation_is_left_alone(
    make_engine: MakeEngine, spy: list[str | None]
) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: "yes"), session_id="field")

    class State(BaseModel):
        count: int = 0

    class Typed(Workflow):
        @step
        async def ask(self, ctx: Context[State], ev: StartEvent) -> StopEvent:
            return StopEvent(result=str(await llm.acomplete("hi")))

    class Editing(Workflow):
        @step
        async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
            async with ctx.store.edit_state() as state:
                state.count = 1
                return StopEvent(result=str(await llm.acomplete("hi")))

    assert await Typed().run() == await Editing().run() == "yes"
    assert spy == ["field", "field"]


async def test_parallel_calls_of_one_step_agree_on_the_conversation(
    make_engine: MakeEngine, spy: list[str | None]
) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: "yes"))

    class Ask(Workflow):
        @step
        async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
            await asyncio.gather(*(llm.achat([ChatMessage("hi")]) for _ in range(8)))
            return StopEvent(result="done")

    await Ask().run()
    assert len(spy) == 8
    assert len(set(spy)) == 1

"""What names the conversation of a call that does not say it itself: agents pass no session.

The order: the call's keyword `session_id`; `with conversation("id")`; `instrument_tags({"session_id": "id"})`; inside a
step of an agent or workflow, the run's `Context`; the LLM's field `session_id`. Where none of them names one, the
engine package's `ConversationFinder` find it by what the call shows.
"""

from __future__ import annotations

import uuid

from llama_index.core.workflow import Context, WorkflowRuntimeError
from llama_index_instrumentation.dispatcher import active_instrument_tags
from workflows.context.state_store import DictState

from copyspec_engine.adapters.conversations import current_conversation, first_named

__all__ = ["CONTEXT_KEY", "named_session", "step_session"]

CONTEXT_KEY = "copyspec_session_id"
"""Where a workflow's `Context` keeps the conversation in its store; it survives `Context.to_dict`."""


def named_session() -> str | None:
    """The conversation that the code around a call names; None if it names none."""
    tagged = active_instrument_tags.get().get("session_id")
    return first_named(current_conversation(), str(tagged) if tagged else None)


async def step_session() -> str | None:
    """The conversation of the workflow run in whose step this is called; None outside of one.

    It is the `session_id` of the run's memory if that has one, else a fresh one. The first answer is kept in the
    context's store: a restored context goes on in the same conversation, although memories do not always survive that.
    """
    try:
        store = Context.get_step_context().store
    except WorkflowRuntimeError:  # not in a step
        return None
    state_type: type = store.state_type
    if not issubclass(state_type, DictState):  # a state with fields of its own has no room for ours
        return None
    kept = await store.get(CONTEXT_KEY, default=None)
    if kept is None:
        try:
            async with store.edit_state() as state:  # calls side by side must agree
                kept = state.get(CONTEXT_KEY) or getattr(state.get("memory"), "session_id", None) or uuid.uuid4().hex
                state[CONTEXT_KEY] = kept
        except RuntimeError:  # the step is inside an edit of its own: nothing can be kept now
            return None
    return str(kept)

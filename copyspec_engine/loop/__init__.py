"""The loop that moves every running request on: schedule, draft, run, sample, verify, commit.

May import: values, compiled, chat, models, kv, memory, drafting, sampling, grammar, provenance, execution.
Nouns: `EngineCore`, `Request`, `StepRow`, `Scheduler`, `Conversations`, `DraftWriter`.
"""

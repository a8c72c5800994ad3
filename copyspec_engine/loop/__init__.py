"""The loop that moves every running request on: schedule, draft, run, sample, verify, commit.

May import: all rooms above. Nouns: `EngineCore`, `Request`, `StepRow`, `Scheduler`,
`Conversations`, `DraftModel`.
"""

"""The plain data that goes in and comes out: options, answers, errors, reports of a load.

May import: nothing of ours. Nouns: `EngineConfig`, `GenerationRequest`, `GenerationOutput`, `EngineInfo`,
`CopySpecError`.
"""

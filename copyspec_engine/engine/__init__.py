"""The front door: requests come in, wait for a place, and their answers go out, from any thread.

May import: values, compiled, chat, models, kv, memory, drafting, sampling, grammar, provenance, execution, loop.
Nouns: `Engine`, `RequestHandle`, `LoopThread`.
"""

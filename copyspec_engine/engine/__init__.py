"""The front door: requests come in, wait for a place, and their answers go out, from any thread.

May import: loop and all rooms above. Nouns: `Engine`, `RequestHandle`, `EngineLoop`.
"""

"""Where the copied tokens of an answer came from: trails while it is written, spans and sources for a reader.

May import: values, chat, memory, drafting, compiled. Nouns: `CopyTrail`, copy, span, source.
"""

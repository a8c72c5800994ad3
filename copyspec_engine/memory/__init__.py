"""What a conversation remembers: its texts, where any run of tokens stands in them, and what copying has taught.

May import: values, compiled. Nouns: `SessionMemory`, `CopyIndex`, `SessionStore`,
`TextStore`, `MemoryFile`, `MemoryDatabase`.
"""

"""`copyspec scale`: several engines on one or more machines, each conversation to its own.

May import: values, engine and serve. Nouns: slot, key, score.

A slot is the stable name of a replica: whoever takes its place has the same one. A conversation belongs to a slot
(`routing`).
"""

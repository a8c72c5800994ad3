"""How a forward pass runs: weights, attention over slots, what a pass costs, and the check of all that at load.

May import: values, models, chat, drafting, compiled. Nouns: `ModelRunner`, `LoadedModel`, `Piece`, `KVStore`.
"""

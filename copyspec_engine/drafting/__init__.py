"""What to propose: a tree of tokens that the answer may go on with, as large as it pays.

May import: values, memory, compiled. Nouns: `DraftTree`, `DraftingPolicy`, `Drafter`, pointer, candidate.
"""

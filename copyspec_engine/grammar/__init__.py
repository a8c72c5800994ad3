"""Answers of a prescribed form: which tokens may come next, along every branch of a draft.

May import: values, chat, drafting. Nouns: `GrammarState`, schema, pattern.
"""

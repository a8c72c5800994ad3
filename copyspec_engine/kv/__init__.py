"""Who holds which slots of the KV cache, and which rows are kept for the next call.

May import: values. Nouns: `KVRows`, `Row`, `KVPool`, slot, `PrefixCache`.
"""

"""Who holds which slots of the KV cache, and which sequences are kept for the next call.

May import: values. Nouns: `KVSlots`, `KVSequence`, `KVPool`, slot, `PrefixCache`.
"""

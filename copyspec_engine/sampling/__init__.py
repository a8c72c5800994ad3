"""Which token comes next, by the rules of the request, and how far a draft agrees with that.

May import: values, memory, drafting, compiled. Nouns: `SampleRow`, `Verdict`, noise, processor.
"""

"""The compiled part of drafting: pointers into the memory, candidates at them, and the tree grown from these."""

"""The `copyspec` command. What `bench`, `eval` and `explain` do is in the lab.

May import: the public names and what tells of models; the lab when a command needs it.
Nouns: command, option, exit code.
"""

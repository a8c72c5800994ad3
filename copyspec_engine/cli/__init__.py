"""The `copyspec` command. What `bench`, `eval` and `explain` do is in the lab."""

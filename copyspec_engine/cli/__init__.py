"""The `copyspec` command: `demo`, `chat` and `info`."""

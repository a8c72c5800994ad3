"""`copyspec serve` and clients that nobody here wrote: `make conformance` says whether each does what its users expect.

`python -m scripts.conformance` starts the servers, runs each client in the environment that it needs, and prints one
table. The clients' scripts need their client and the server's address, and nothing of copyspec.
"""

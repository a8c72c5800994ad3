"""Models by name: what a name means, where its files are found, and how they get there.

Importing this package loads nothing heavy: torch and the hub's client are imported when they are needed.
"""

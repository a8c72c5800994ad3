"""Measuring: recorded and free runs, peers, benchmarks, and the tables and pages made of them.

May import: everything; nothing but the command line imports it, when a command needs it, and the commands' options.
Nouns: replay, record, run, peer.
"""

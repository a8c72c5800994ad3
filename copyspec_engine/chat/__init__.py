"""What people, templates and models write: messages into prompts, tokens into text, and text into replies.

May import: values. Nouns: `ChatTokenizer`, `ChatFormat`, `TextStream`, `ReplyParser`, `KnownIds`.
"""

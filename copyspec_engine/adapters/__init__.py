"""What the integrations for LangChain and LlamaIndex share; it knows neither of them.

May import: the public names, values, chat and engine. Nouns: `AdapterOptions`, `Conversations`.
"""

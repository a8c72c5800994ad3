"""What the integrations for LangChain and LlamaIndex share; it knows neither of them.

May import: values, chat, memory, execution and engine.
Nouns: `AdapterOptions`, `LocalModel`, `RemoteEngine`, `ConversationFinder`, `Talk`.
"""

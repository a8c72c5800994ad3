"""What the integrations for LangChain and LlamaIndex share; it knows neither of them.

May import: values, chat, execution and engine. Nouns: `AdapterOptions`, `LocalModel`, `ConversationFinder`, `Talk`.
"""

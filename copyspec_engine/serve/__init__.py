"""`copyspec serve`: one engine for several users over HTTP, in OpenAI's form.

May import: values, chat, engine and adapters. Nouns: `ServeConfig`, `Tenant`, `Call`, `ApiError`, `EventResponse`.

An endpoint translates: a body into requests, chunks into its wire form. All else is the same for every endpoint: whose
conversation it is (`conversations`), admission, quotas and what ends a call (`calls`), errors, events, metrics.
"""

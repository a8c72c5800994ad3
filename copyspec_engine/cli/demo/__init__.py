"""`copyspec demo`: a chain of edits of a document, beside plain decoding, and with --compare beside the peers."""

"""The whole engine measured on recorded answers: real-shape models with random weights, forced to write the record.

Every forward pass, cache write and sampling step costs what it would on the real checkpoint, and drafts are accepted as
far as they equal the record; only which token is the likeliest is decided by the record instead of the weights.
"""

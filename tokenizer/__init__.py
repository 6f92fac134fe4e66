"""Tokenizer (paper §2.1): `tokenizer.tokenizer` encodes and decodes, `tokenizer.train` trains."""

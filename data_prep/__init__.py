"""Corpus preparation: sources to tokenizer, sources to shards, checks. The command is ``monet-data``."""

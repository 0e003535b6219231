"""Vocabularies and tokenizers, rebuilt from files other than `tokenizer.json`."""

"""Vocabularies and tokenizers, rebuilt from files that have them in another form than `tokenizer.json`."""

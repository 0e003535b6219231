"""State that sequences keep between steps: KV blocks, windows, recurrent states, and their files."""

"""What sequences keep between steps: KV blocks, windows, recurrent states, and files of them."""

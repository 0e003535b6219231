"""The API dialects, a file each."""

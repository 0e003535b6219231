"""The API dialects, one file each."""

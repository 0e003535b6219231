"""Personal data and secrets in texts: found, replaced by placeholders, and put back."""

"""The checks and the audit around requests."""

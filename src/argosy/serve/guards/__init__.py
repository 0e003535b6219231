"""Checks and the audit around requests."""

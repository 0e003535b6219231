"""Readers of configs and files that all families share."""

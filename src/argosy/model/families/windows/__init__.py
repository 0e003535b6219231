"""Families in which some layers have a sliding window, and the others see all positions."""

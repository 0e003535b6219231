"""Families in which some layers have a recurrent state."""

"""Families whose layers all have grouped-query attention."""

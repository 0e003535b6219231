"""Families that also see or hear; most have the text model of another family."""

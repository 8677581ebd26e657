"""Measures how good masks are: against annotations, and against another model's masks."""

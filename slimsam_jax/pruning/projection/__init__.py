"""Chooses a basis before the cut, for the groups of any function whose basis is free."""

"""How good the masks are: against annotations, and against another model's masks."""

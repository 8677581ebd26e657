"""From pictures and prompts to masks."""

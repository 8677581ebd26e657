"""From images and prompts to masks."""

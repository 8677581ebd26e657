"""Names and layouts of published checkpoints, a family a file: tables that are read in both directions."""

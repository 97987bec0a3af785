"""Tasks: what samples mean and what is done with them. One folder per task."""

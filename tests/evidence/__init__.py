"""docs/evidence.md, made of the runs."""

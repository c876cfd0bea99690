"""vllmctl: one file per verb."""

"""The configuration: one table of settings, and the loader."""

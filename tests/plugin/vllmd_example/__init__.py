"""Engines for vllmd that somebody else wrote."""

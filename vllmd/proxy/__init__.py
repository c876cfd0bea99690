"""The relay: h11 for heads, bytes for bodies, and the accept loop."""

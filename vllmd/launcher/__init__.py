"""The launcher: the small privileged helper that owns the engines' scopes, and its client."""

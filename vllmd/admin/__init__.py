"""The endpoints that answer from snapshots: models, health, admin, metrics."""

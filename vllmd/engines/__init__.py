"""Engine kinds: each a small stateless class that says what to run and which calls mean what."""

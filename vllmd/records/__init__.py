"""Records: the last requests, which can be looked into, and how much each key has used of each model.

``ring`` has the last requests, in memory; ``bodies`` their bodies, while recording is switched on, with secrets cut
out; ``sums`` adds up use by hour, key and model; ``trace`` has arrivals in a compact form; ``store`` keeps the last two
in SQLite. Only ``store`` waits for a disk, and belongs into a thread; ``daemon.records`` puts all of it together.
"""

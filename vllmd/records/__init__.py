"""What was asked for: the last requests, which can be looked into, and who used how much of what.

``ring`` has the last requests, in memory; ``bodies`` what of them is kept while somebody has that switched on, and what
is cut out of it; ``sums`` adds up use by hour, key and model; ``trace`` has arrivals in a compact form; ``store`` keeps
the last two in SQLite. Nothing here waits for anything, but for ``store``, which belongs into a thread; the daemon's
``daemon.records`` puts it all together.
"""

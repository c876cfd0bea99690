"""The endpoints that answer from snapshots and post events: models, health, admin.

``control.py`` says what they may ask of the daemon, ``models.py`` holds what any
client may read, ``operate.py`` what an operator may do. They decide nothing.
"""

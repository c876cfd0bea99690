"""What the daemon and the launcher need of systemd: socket activation, notify, journal.

``activation`` takes the listeners by name, ``notify`` speaks to the service
manager, ``journal`` chooses where the log goes. None of them needs systemd to be
there: without it they give nothing, say nothing, and write readable text.
Scopes are the launcher's: ``vllmd/launcher/scopes.py`` alone knows pystemd.
"""

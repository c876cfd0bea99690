"""The launcher: the small helper that owns the engines' processes, and its client.

To read in this order::

    protocol   the messages, checked
    service    who may connect, what each message does
    engines    the life of an engine, from the order to the report of its end
    handover   ... one that is made of a standby, whose imports are done
    spawn      the child: drop privileges, wait at the gate, execute
    backend    what a way of running engines offers
    scopes     ... with systemd
    bus        ... its manager on D-Bus; the only file that knows pystemd
    orphans    ... and engines without a daemon, which are ended
    sessions   ... without
    cgroup, process, logs, lines, loop    the parts they are made of
    client     the daemon's end (asyncio)

It runs as root (CAP_SETUID, CAP_SETGID and CAP_KILL only), in a user's systemd,
or as the private child of ``vllmd serve``. It outlives the daemon, so that exit
statuses are not lost; engines outlive both.
"""

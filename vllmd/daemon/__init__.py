"""The daemon: the only meeting point of all rooms.

::

    main        argv -> configuration -> listeners -> Daemon -> exit status
    service     the life of the daemon, from its doors to its shutdown
    opening     how it gets its devices, launcher and engines, after the doors are open
    listen      sockets of our own, where systemd gives none
    doors       the listeners and their routes
    keys        who may what: keys, scopes, the admin socket
    meters      what each key has used, and its limits
    loop        the inbox: events to the core, its commands to whoever does them
    admission gate   the proxy's gate: one arrival, one ending, whatever happens between
    fleet       engines: start, wake, sleep, stop, each a task that posts its event
      orders      what a start needs: place, launch, the order to the launcher
      sleeps      to sleep and awake again, by the engine's own calls
      calls       HTTP calls to engines; words how a failure is told
      member      one engine and what is known of it; ports for those without Unix sockets
    adoption    what is found running when the daemon starts
    memory      samples of the devices, and whether freed memory came back
    specs       a configured model as the core sees it
    names       what a client calls a model -> the model
    roster      models and their replicas, as operators name and see them
    control     what the admin endpoints may ask; guests models that programs bring along
      probing     replicas asked a short question by an operator: who answers first
      instances   M's start on a GPU of the caller's choice
    portrait    how models and devices are shown to clients and operators
    processes   processes on the devices: whose they are, and how to be rid of one
    discovery   models of the Hugging Face cache that nobody configured
    logfile     an engine's output in a rotating file
    learnt      footprints and costs kept over restarts
    preflight   what models will take, and which of them can never work; check says it and ends
    kinds       each model's engine, or why it has none
"""

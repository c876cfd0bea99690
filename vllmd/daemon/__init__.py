"""The daemon: the only package that meets all others.

::

    main             argv -> configuration -> listeners -> Daemon -> exit status
    service          the life of the daemon, from its listeners to its shutdown: both ends, chores, reload
    front_end        what clients meet, built at once; current: the configuration in force, and what is there later
    back_end         what is behind it, awaited once; startup builds it: devices, core, launcher, engines
      expectations     what a configuration means on this machine; reload: going on with another one
    listen           sockets of our own, where systemd gives none; identity: the user to become then
    listeners        the listening sockets and their routes; public_listeners: those that other machines reach
    keys             authentication: API keys, peer credentials on the operators' sockets; logins: wrong keys
    quotas           the limits of keys, and what each has used
    dispatcher       the inbox: events to the core, its commands to the parts that execute them
    admission_gate   the proxy's gate: one arrival and one ending per request, whatever happens between
    engine_manager   engines: start, wake, sleep, stop, each a task that posts its event
      launch_planner   what a start needs: place, launch, the order to the launcher
      loaders          which loader reads the weights, chosen and measured
      engine_keys      the keys that engines on ports ask clients for
      sleeps           to sleep and awake again, by the engine's own calls
      health           whether a loaded engine still serves; one of no use is killed
      calls            HTTP calls to engines; failure_text: how a failure is told
      engine_process   one engine and what is known of it; ports for those without Unix sockets
    adoption         engines found running when the daemon starts
    device_watch     asks which devices there are until that is known, and again when the kernel speaks of them
    memory           samples of the devices, and whether freed memory came back
    device_readings  tells the core what the devices hold, once for each change
      power            watts and joules, shared out among the engines of a device
    host             the host's memory, as control groups leave it
    specs            configured models as the core sees them
    status           what is shown of one moment, by pure functions; changes: what changes, as it does
    following        a model's progress, an engine's log, for as long as somebody listens
    operator_commands  what operators have done: each an event for the core
      probing          replicas are asked a short question by an operator: which answers first
      instances        a start on a GPU of the caller's choice
      runtime_models   models added over the API
    serializers      how models and devices are shown to clients and operators
    homes            whom an engine runs as, and where its home is
    self_description what a running engine says of itself: its context, its tasks
    processes        processes on the devices: whose they are, and how to end one
    discovery        models of the Hugging Face cache that nobody configured
    logfile          an engine's output in a rotating file
    event_loop       uvloop where it is installed, else asyncio's own
    learnt           footprints and costs kept over restarts
    private_folder   the run directory of a daemon without a unit, and those that killed ones left
    preflight        what models will take, and which of them can never work; check says it and ends
    engine_resolver  each model's engine, or why it has none
"""

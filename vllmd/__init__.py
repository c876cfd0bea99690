"""vllmd turns a Linux box with GPUs into a shared model server.

The packages, and what each may import of the others (``tests/test_house.py``
holds this table against the imports)::

    errors      one tree of errors, each with its HTTP status     imports nothing
    text        text from outside, made fit to be shown           imports nothing
    sizes       amounts of memory, written and read               imports nothing
    addresses   which of them only this machine reaches           imports nothing
    credentials who is at the other end of a Unix socket          imports nothing
    foreign     files that somebody else may write: one reader    frozen, sizes
    place       what control groups and sysctls leave of this
                machine: memory, CPUs, tasks, ports               frozen
    frozen      values that nobody changes, cheap to declare      nothing of ours
    core/       decides everything about models and memory: pure  core, frozen, sizes
    api/        what daemon and clients tell each other, and
                the table of operators' verbs                     errors, frozen
    config/     one table of settings, the loader                 addresses, core.lack, core.types, errors, foreign,
                                                                  frozen, sizes, text
    gpu/        NVML, or the devices that the configuration says  core.types, config, errors, frozen, place,
                                                                  simengine, sizes
    hub         models in the Hugging Face cache                  foreign, frozen
    engines/    an engine kind: spec -> argv, probes, sleep calls,
                and what it will take of memory                   core.lack, core.types, config, errors, foreign,
                                                                  frozen, hub, sizes, text
    installer/  engines' environments: installed by pip, chosen,
                removed; a service of its own                     credentials, engines, errors, frozen, sizes
    systemd/    socket activation, notify, journal                errors, text
    launcher/   the privileged helper and its client; the only
                package that knows pystemd                           credentials, systemd, errors, frozen, text
    proxy/      h11 heads, byte relay, the accept loop            addresses, api.names, config.types, core.types,
                                                                  credentials, errors, frozen
    ui/         the page: its files                               proxy's HTTP types, frozen
    records/    the last requests, use by hour, key and model,
                arrivals, and their store                         api, proxy, errors, frozen
    admin/      model list, health, admin and metrics endpoints,  api, proxy's HTTP types, core.types, records, ui,
                signing in to the page                            errors, frozen
    store/      models as files: names, sources, the program
                that fetches, what other programs have            hub, engines, foreign, errors, frozen, text
    ollama/     Ollama's API, translated to the engines' own      api, proxy, admin.control, errors, frozen
    daemon/     the event queue; executes the core's commands     all but cli and client
    client/     the Python library                                addresses, api, errors
    cli/        vllmctl, a row or a file per verb                 api, client, errors, config, engines, frozen, gpu,
                                                                  installer, place, simulate, sizes, store, text
    simulate/   the core under a virtual clock over a trace       core, config, engines, errors, frozen, gpu, hub, text
    simengine   the stand-in engine                               nothing of ours

``core/design.md`` tells why, and draws the lifecycle.
"""

__version__ = "0.1.0"

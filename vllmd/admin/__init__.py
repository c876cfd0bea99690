"""The endpoints that answer from snapshots and post events. They decide nothing.

::

    control     what they may ask of the daemon
    routes      the route tables: path, handler, scope, documentation
    models      for every client: models, health, version
    verbs       the operators' verbs, each a row of vllmd.api.verbs; streams: logs and events
    instances   the instances API, /api/v1: GPUs, processes, models on GPUs
    runtime_models  models that programs add
    counters    the counters since the daemon's start
    metrics     /metrics; exposition writes it for Prometheus, relabel the engines' own
    openapi     /openapi.json of the route table; schemas has the words, page is /docs
"""

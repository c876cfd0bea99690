"""The endpoints that answer from snapshots and post events. They decide nothing.

::

    control     what they may ask of the daemon
    routes      which path is whose, who may, and what /openapi.json says of it
    models      what any client may read: models, health, version
    verbs       the operator's verbs, each a row of vllmd.api.verbs; streams: logs and events
    instances   the instances API, /api/v1: GPUs, processes, models on GPUs
    runtime_models  models that programs bring along
    counters    what is counted as it happens
    metrics     /metrics; exposition writes it for Prometheus, relabel the engines' own
    openapi     /openapi.json of the route table; schemas has the words, page is /docs
"""

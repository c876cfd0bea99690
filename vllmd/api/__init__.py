"""What the daemon and its clients tell each other. Pure: nothing here knows a socket, a process or the core.

::

    answers   the JSON objects as frozen dataclasses: a model's line, a device, a decision, ...
    codec     these as JSON, from JSON, and as JSON Schema: nobody writes any of it a second time
    kinds     the kinds of values that a verb takes, each with its check and its schema
    verbs     the table of operators' verbs: one row makes the route, its documentation, the clients' methods
              and the verb of vllmctl
"""

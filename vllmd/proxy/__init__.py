"""The relay: h11 reads heads, bodies pass as bytes between two asyncio Protocols.

From the wire inwards::

    server       accepts on listeners that are open already, counts, drains
    connection   one client: request after request, limits and deadlines; body_memory: whose bodies may take how much
                 departures: is a client still there that has shut its sending side, or is silent?
    reader       bytes -> heads and bodies (pure), over heads and framing
    access       authorisation: a caller's scopes, and the scope of a route; hosts, cors: which web pages are served
    routing      path -> handler; paths: paths of other servers; exchange: one request and its answer
    forward      a model's request, from its last byte to its answer's: read this one first. Its steps:
                 model_requests (which model is meant?), over decoding (to plain UTF-8) and peek (find ``model``;
                 large: in megabytes); gate (acquire a permit), loading_heartbeat (SSE comments until the first byte)
    upstream     connections to engines, their pool, and ``request`` for control calls; response_heads: collected from
                 pieces, and normalised
    peers        which process listens at an engine's address, and which holds a client's end
    answer       the engine's answer on its way back; rewrite puts the client's name for the model into it
    tunnel       WebSockets: bytes both ways
    models       the table of model routes; engine_api: the part of an engine's own API that is passed on

The interface to the daemon is ``gate``; requests and answers, which ``admin`` uses too, are in ``http``.

The cost of a request, beside nginx, HAProxy and others in the same run, is in tests/bench/proxy.md; a good part of it
is system calls on sockets. Tried without a measurable gain: receiving into a buffer that is kept
(``BufferedProtocol``), a leaner selector, no garbage collection.
"""

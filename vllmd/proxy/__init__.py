"""The relay: h11 reads heads, bodies pass as bytes between two asyncio Protocols.

From the wire inwards::

    server       accepts on listeners that are open already, counts, drains
    connection   one client: request after request, limits and deadlines; body_memory: whose bodies may take how much
                 departures: is a client still there that says nothing more?
    reader       bytes -> heads and bodies (pure), over heads and framing
    access       authorisation: who a caller is, and what a route needs; hosts, cors: what browsers may
    routing      path -> handler; paths: what clients write instead; exchange: one request and its answer
    forward      a model's request, from its last byte to its answer's: read this one first. Its steps:
                 model_requests (which model does it want?), over decoding (to plain UTF-8) and peek (find ``model``;
                 large: in megabytes); gate (may it go?), loading_heartbeat (SSE comments until its first byte)
    upstream     connections to engines, their pool, and ``request`` for control calls; response_heads: from pieces,
                 and put right
    peers        who listens where an engine should: nobody else gets a byte; who holds a client's end
    answer       the engine's answer on its way back; rewrite puts the client's name into it
    tunnel       WebSockets: bytes both ways
    models       the table of model routes; engine_api: what of an engine's own API is passed on

What it costs, beside nginx, HAProxy and others in the same run, is in tests/bench/proxy.md; a good part of it is system
calls on sockets. What gained nothing that could be measured: receiving into a buffer that is kept
(``BufferedProtocol``), a leaner selector, no garbage collection.

What it needs of the daemon is in ``gate``; what it and ``admin`` say to each other is in ``http``.
"""

"""Ollama's API over the engines' routes, which are OpenAI's: what clients send is translated, and the answer back.

An engine is asked as if the client had spoken OpenAI: the relay gets an exchange of our making (``inner``) whose
request is the translated one, and whose "connection" translates what is written to it. So queues, limits, retries,
signs of life and a client that leaves are the relay's business, here as everywhere, and nothing of this package is in
another route's way.

    fields      reading a request's members, each refusal with the member's name
    files       images and sounds of megabytes: moved, not read
    options     the table of ``options``: Ollama's name -> the engines'
    requests    /api/chat, /api/generate, /api/embed -> a request of OpenAI's; pure
    context     the conversation so far as the numbers that ``context`` is
    answers     OpenAI's events and answers -> Ollama's objects; pure
    lines       a stream of events -> NDJSON, most of it without reading it; pure
    inner       the exchange that the relay has in the client's place
    models      /api/tags, /api/ps, /api/show
    endpoints   the route table, and what needs no engine
    schemas     what /openapi.json says of them
    store       what /api/pull, /api/delete and the like can do

Written by Ollama's API document and by what its own clients send and take (0.6 of both, Python's and JavaScript's).
"""

"""The stand-in engine: vLLM's HTTP surface without a model, for rehearsals and tests.

``python -m vllmd.simengine --uds PATH`` behaves as vLLM 0.32 does (its sleep
protocol with all its traps included), takes the time and the memory that it
is told to take, and fails when and how it is told to. It needs the standard
library only and imports nothing else of ours::

    options     the command line, as one frozen object
    failures    the failures on demand, as one table
    device      a pretended GPU: a file that says who holds how much
    cuda        real device memory through torch, for ``make gpu-check``
    logs        log lines shaped like vLLM's
    text        deterministic tokens and answers
    state       slots, pauses, sleep and wake: vLLM's scheduler and executor in small
    http        HTTP/1.1 and WebSocket over asyncio
    context     what every route needs: the state, the options, the refusals
    generate    chat, completions, responses, messages
    pooling     embeddings, rerank, score, classify, pooling, tokenize, audio
    control     models, health, metrics, and the development routes
    realtime    the WebSocket route
    app         the route table
    server      the start, the phases of the load, the end

``vllmd.simengine.device.device_usage(path)`` reads a pretended GPU.
"""

"""The core decides everything about models and memory, and does nothing.

Events in, commands out: no I/O, no clock (``now`` is an argument, in seconds),
no logging, no asyncio. ``design.md`` says why it decides as it does.
"""

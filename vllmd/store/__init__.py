"""Models on this machine's disk as an operator has them: named, fetched, found in other programs' folders, removed.

What a name means is ``names``, which sources it has ``known``; ``fetch.py`` is the program that fetches and removes,
which is run as the engines' user; ``elsewhere`` finds what Ollama and LM Studio have.
"""

"""Models as files on this machine: named, fetched, found in other programs' folders, removed.

``names`` says which sources a name means, ``known`` has the well-known ones; ``fetch.py`` is the program that fetches
and removes, run as the engines' user; ``elsewhere`` finds the models of Ollama and LM Studio.
"""

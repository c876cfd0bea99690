"""One file per verb of vllmctl; ``arguments.py`` says what a verb is made of."""

"""Engines' environments: made, chosen, gone back on and removed (``vllmctl engine``).

    recipes    what each kind of engine is made of, for a CPU or for CUDA
    folders    the versions of a kind side by side, and which one is in use
    pip        pip at work: how far it is, and in one sentence why it failed
    install    the procedure: make, install, prove, put in place, use
    requests   who may ask for what, and the lines that go back
    service    one request over the socket that systemd holds

It is not the daemon that does this, nor root. On a machine with the units a connection to ``vllmd-installer.socket``
starts ``vllmd-installer@.service``: a user of its own, who may write engines' environments and nothing else, and
reaches the network. The daemon, which faces clients, can change no engine; engines, which read what strangers wrote,
cannot change what they will run next time; and whoever installs cannot read a request, a key or a model. A user's own
environments are made by that user's ``vllmctl`` itself.
"""

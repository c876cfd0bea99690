"""The parts of ``make gpu-check``, each a file with ``run(bench)`` that adds rows to the bench's table.

::

    bench         what all parts work with: the device, the table, the time that is left
    readings      NVML against torch's own figures; which CUDA_VISIBLE_DEVICES torch takes; a device's facts
    attribution   two engines' memory by their processes, asleep, awake, stopped, killed
    turns         two models that do not fit together under load through the daemon; its death and the adoption
    transformers  a small real model on the GPU through the daemon
    forks         whether a process that has imported torch may be forked
    copies        what moving 20 GiB between host and device costs, pinned and not
    daemon        starts vllmd and a launcher that outlives it, without systemd
    launcher      that launcher

Needs no more than torch, nvidia-ml-py and vllmd's own dependencies; ``tests/gpu/rehearsal`` has stand-ins for the
first two, so that every part runs on a machine without a GPU as well.
"""

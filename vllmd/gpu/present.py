"""The devices of this machine, and whether a model's settings fit them, for commands without a daemon."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.config.types import Config, ModelConfig
from vllmd.config.unfit import unfit as unfit_of
from vllmd.core.types import Device
from vllmd.gpu.cpu import gpus
from vllmd.gpu.sources import open_devices
from vllmd.gpu.thread import answer_within

PATIENCE_SECONDS = 5.0  # for a driver's answer


def present(config: Config) -> tuple[Device, ...]:
    """The GPUs, or the devices that are declared; none where the driver does not answer (the daemon will say so).

    All of them: a CUDA_VISIBLE_DEVICES of the caller's shell is not the daemon's.
    """
    return answer_within(PATIENCE_SECONDS, lambda: gpus(open_devices(config, {}).inventory())) or ()


def unfit(model: ModelConfig, devices: Sequence[Device]) -> str:
    """Why these devices can never meet the settings of devices and memory; "" if they can, or there is no device."""
    return next((found.why for found in unfit_of(model, devices)), "") if devices else ""

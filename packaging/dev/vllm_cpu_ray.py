"""A platform plug-in of vLLM for tests: the CPU, whose processes Ray counts as its GPUs (ray start --num-gpus)."""

from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    """The CPU, and what Ray calls its devices."""

    ray_device_key = "GPU"


def register() -> str:
    """Where the platform is."""
    return "vllm_cpu_ray.Platform"

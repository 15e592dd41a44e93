"""What this machine is, and what memory a process takes. Never imports torch.

::

    environment    describe_environment, what_runs: what is installed, what runs here
      ├── machine  processor, instruction sets, cores, RAM, limits of a container
      └── memory   GPUs, process trees, MemorySampler, OtherLoad
            └── machine

The experiment's parent process uses these while another process works, so everything here is
cheap: `/proc` and NVML rather than libraries that take a second to load.
"""

from pagelab.telemetry.environment import (
    Capability,
    describe_environment,
    package_version,
    what_runs,
)
from pagelab.telemetry.machine import available_cores, ram
from pagelab.telemetry.memory import (
    MemorySampler,
    OtherLoad,
    gpus,
    own_peak_rss_bytes,
    process_tree,
    rss_bytes,
)

__all__ = [
    "Capability",
    "MemorySampler",
    "OtherLoad",
    "available_cores",
    "describe_environment",
    "gpus",
    "own_peak_rss_bytes",
    "package_version",
    "process_tree",
    "ram",
    "rss_bytes",
    "what_runs",
]

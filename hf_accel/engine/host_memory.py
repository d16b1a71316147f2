"""How much of the host's memory can be taken. Knows nothing of what for."""

from __future__ import annotations


def available_memory() -> int:
    """Bytes of host memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30

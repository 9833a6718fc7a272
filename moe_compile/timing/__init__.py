"""Times the providers that take a call, on this device, and remembers what it found."""

from moe_compile.timing.contest import Contests, Timing

__all__ = ["Contests", "Timing"]

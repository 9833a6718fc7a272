"""The random number generators of one process."""

import random
from typing import Any

import numpy
import torch


def rng_state(device: torch.device) -> tuple[Any, ...]:
    """The states of Python's, numpy's and torch's generators, and of the device's."""
    state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    if device.type == "cpu":
        return state
    return *state, torch.get_device_module(device).get_rng_state(device)


def set_rng_state(state: tuple[Any, ...], device: torch.device) -> None:
    """Goes on where `rng_state` was called; a device of another kind keeps its own."""
    own, arrays, cpu, *devices = state
    random.setstate(own)
    numpy.random.set_state(arrays)
    torch.set_rng_state(cpu)
    if devices and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(devices[0], device)

"""Providers of canonical ops, one a file, and the choice between them."""

from moe_compile.providers.provider import Call, Provider
from moe_compile.providers.registry import PROVIDERS, choose

__all__ = ["PROVIDERS", "Call", "Provider", "choose"]

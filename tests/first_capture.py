"""A first capture: imported by the process that ranks are forked from.

A fresh process spends more than a third of its first `optimize` on templates, and on what torch
imports when it traces for the first time.
"""

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build

moe_compile.explain(build("gpt_oss"), config=OptimizeConfig(verify="off"))

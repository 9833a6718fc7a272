"""A first capture: imported by the process that ranks are forked from.

A fresh process spends more than a third of its first `optimize` on templates, and on what torch
imports when it traces for the first time. Where there is a GPU, a capture begins CUDA, which a
forked process could not use then.
"""

import torch

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build

if not torch.cuda.is_available():
    moe_compile.explain(build("gpt_oss"), config=OptimizeConfig(verify="off"))

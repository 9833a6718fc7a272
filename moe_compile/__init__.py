"""Makes any loaded Hugging Face mixture-of-experts model train fast, by rewriting its graphs."""

from moe_compile.adapters.trainer import TrainerMixin
from moe_compile.balance import RouterBalance, RouterLoad
from moe_compile.checkpoint.load import load_pretrained
from moe_compile.checkpoint.state import load_state, save_state
from moe_compile.config import OptimizeConfig
from moe_compile.graphed_step import GraphedStep
from moe_compile.optimize import explain, optimize, report
from moe_compile.parallel.clip import clip_grad_norm_
from moe_compile.passes import PIPELINE
from moe_compile.report import Report
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.pipeline import Pass, Pipeline
from moe_compile.rewrite.refuse import Refuse

__all__ = [
    "PIPELINE",
    "GraphedStep",
    "Match",
    "OptimizeConfig",
    "Pass",
    "Pattern",
    "Pipeline",
    "Refuse",
    "Report",
    "RouterBalance",
    "RouterLoad",
    "TrainerMixin",
    "clip_grad_norm_",
    "explain",
    "load_pretrained",
    "load_state",
    "optimize",
    "report",
    "save_state",
]

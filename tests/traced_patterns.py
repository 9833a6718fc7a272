"""Every template, traced once: imported by the process that ranks are forked from.

A fresh process spends a third of its first `optimize` on them, and on what torch imports when it
traces for the first time.
"""

from moe_compile.passes import PIPELINE
from moe_compile.rewrite.pattern import templates
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.raising import RaisePass

for raising in PIPELINE.passes:
    for pattern in raising.patterns if isinstance(raising, RaisePass) else ():
        if not isinstance(pattern, ProvenExperts):
            templates(pattern)

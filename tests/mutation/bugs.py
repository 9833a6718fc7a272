"""Bugs that somebody could write into the matcher, the patterns, the dispatch or the lowering.

Each changes what a model computes, or what is refused. `python -m tests.mutation` plants them one
after the other and says which tests notice.
"""

from dataclasses import dataclass

MATCHER = "moe_compile/rewrite/matcher.py"
REGION = "moe_compile/rewrite/region.py"
WEIGHTED_SUM = "moe_compile/rewrite/weighted_sum.py"
NORMAL_FORM = "moe_compile/rewrite/normal_form.py"
ALL_TO_ALL = "moe_compile/kernels/all_to_all.py"
ROWS = "moe_compile/kernels/expert_rows.py"
SHARDS = "moe_compile/parallel/experts.py"
EMBEDDING = "moe_compile/parallel/embedding.py"
PLACING = "moe_compile/passes/dispatch_experts.py"

MESHES = "tests/parallel/test_meshes.py"
EXCHANGE = "tests/kernels/test_all_to_all.py"
FORWARD = "tests/install/test_forward.py"
ROWS_THAT_STAY = "tests/parallel/test_embedding.py"


@dataclass(frozen=True)
class Bug:
    """A change of one place of a file, and the tests that should notice.

    Attributes:
        before: text that the file has once.
        after: what is put in its place.
    """

    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


BUGS = (
    # The matcher, and what it is sure of.
    Bug(
        "literals and sizes are not compared",
        MATCHER,
        "    if _is_tensor(right) or _literal(left) != _literal(right):\n",
        "    if _is_tensor(right):\n",
        ("tests/rewrite/test_matcher.py", "tests/patterns"),
    ),
    Bug(
        "the target shape of a reshape is not compared",
        MATCHER,
        "        if _shape(wanted) != _shape(node):\n",
        "        if False:\n",
        ("tests/rewrite/test_matcher.py", "tests/patterns"),
    ),
    Bug(
        "an inner value that something else uses is rewritten away",
        MATCHER,
        "            if user in match.nodes or (user.target",
        "            if user not in match.nodes or (user.target",
        ("tests/rewrite/test_matcher.py", "tests/patterns"),
    ),
    Bug(
        "a custom autograd function's backward is lost",
        MATCHER,
        '        if node.meta.get("function"):\n',
        '        if node.meta.get("functions"):\n',
        ("tests/test_hf_behaviour.py",),
    ),
    Bug(
        "a difference may be taken the other way round",
        MATCHER,
        "    if pattern.target in _COMMUTATIVE:\n",
        "    if pattern.target in {*_COMMUTATIVE, aten.sub.Tensor}:\n",
        ("tests/rewrite/test_matcher.py", "tests/patterns"),
    ),
    Bug(
        "an activation may mix tokens",
        REGION,
        "        if not fits:\n",
        "        if not fits and not is_reduction(node):\n",
        ("tests/rewrite/test_region.py", "tests/patterns"),
    ),
    Bug(
        "an activation may pair the rows of two values",
        REGION,
        "n in sources if n not in vectors} == {value(node).dim()}\n",
        "n in sources if n not in vectors} >= {value(node).dim()}\n",
        ("tests/rewrite/test_region.py", "tests/patterns"),
    ),
    # Normal form.
    Bug(
        "dropout is dropped",
        NORMAL_FORM,
        """return _input(node) if arguments["p"] == 0 or not arguments["train"] else None""",
        "return _input(node)",
        ("tests/passes/test_normalize.py", "tests/patterns", "tests/test_optimize.py"),
    ),
    Bug(
        "a reversed difference forgets to swap",
        NORMAL_FORM,
        """aten.sub.Tensor, arguments["other"], arguments["self"])""",
        """aten.sub.Tensor, arguments["self"], arguments["other"])""",
        ("tests/passes/test_normalize.py",),
    ),
    Bug(
        "a slice counts from one place further",
        NORMAL_FORM,
        "    start = sum(sizes[:index])\n",
        "    start = sum(sizes[: index - 1])\n",
        ("tests/passes/test_normalize.py", "tests/patterns"),
    ),
    Bug(
        "a scaled sum loses its scale",
        NORMAL_FORM,
        """    scaled = {} if alpha == 1 else {"alpha": alpha}\n""",
        """    scaled = dict[str, Any]()\n""",
        ("tests/passes/test_normalize.py",),
    ),
    # Patterns.
    Bug(
        "the offset of Gemma's norms is forgotten",
        "patterns/rms_norm.py",
        "offset=1.0 if one_plus else 0.0",
        "offset=0.0",
        ("tests/patterns/test_rms_norm.py",),
    ),
    Bug(
        "the order of cast and scale is the other one",
        "patterns/rms_norm.py",
        "eps, cast_first=cast_first, offset",
        "eps, cast_first=not cast_first, offset",
        ("tests/patterns/test_rms_norm.py", "tests/passes/test_raise_norms.py"),
    ),
    Bug(
        "pairs are taken for halves",
        "patterns/rotary_split.py",
        "        return rotary(x, cos, sin, interleaved=interleaved)",
        "        return rotary(x, cos, sin, interleaved=not interleaved)",
        ("tests/patterns/test_rotary_split.py",),
    ),
    Bug(
        "causal attention sees the future",
        "patterns/sdpa_attention.py",
        "scale=scale, causal=causal, dropout=dropout)",
        "scale=scale, causal=False, dropout=dropout)",
        ("tests/patterns/test_sdpa_attention.py",),
    ),
    Bug(
        "attention's dropout is forgotten",
        "patterns/sdpa_attention.py",
        "causal=causal, dropout=dropout)",
        "causal=causal, dropout=0.0)",
        (
            "tests/patterns/test_sdpa_attention.py",
            "tests/passes/test_raise_attention.py",
            "tests/test_optimize.py",
        ),
    ),
    Bug(
        "attention forgets its sinks",
        "patterns/eager_attention.py",
        "attention(query, key, value, mask, sinks, scale=scale)",
        "attention(query, key, value, mask, None, scale=scale)",
        ("tests/patterns/test_eager_attention.py",),
    ),
    Bug(
        "gate and up change places",
        "patterns/gated_mlp.py",
        "gated_mlp(x, gate, up, down, activation, gate_bias",
        "gated_mlp(x, up, gate, down, activation, gate_bias",
        ("tests/patterns/test_gated_mlp.py",),
    ),
    Bug(
        "an expert's weights may be computed",
        "patterns/grouped_experts.py",
        """            if node.op != "get_attr":\n""",
        """            if node.op == "placeholder":\n""",
        ("tests/patterns/test_grouped_experts.py",),
    ),
    # What experts become.
    Bug(
        "a token that passes through is weighed by all of its picks",
        WEIGHTED_SUM,
        "aten.lt.Scalar(ids, count), 0.0)",
        "aten.lt.Scalar(ids, 0), 0.0)",
        ("tests/patterns/test_expert_loop.py", "tests/fuzz/test_judge.py"),
    ),
    Bug(
        "the weights of the first choices are taken for those of the picks",
        WEIGHTED_SUM,
        "aten.gather.default(weights, 1, aten.clamp_min.default(ids, 0))",
        "aten.slice.Tensor(weights, 1, 0, _value(ids).shape[1])",
        ("tests/patterns/test_expert_loop.py", "tests/fuzz/test_judge.py"),
    ),
    Bug(
        "dropped picks go to expert 0",
        "moe_compile/rewrite/dispatch_mask.py",
        "aten.eq.Scalar(top[0], 0), -1)",
        "aten.eq.Scalar(top[0], 0), 0)",
        ("tests/rewrite/test_dispatch_mask.py",),
    ),
    Bug(
        "experts that compute different things are taken for like ones",
        "moe_compile/rewrite/unrolled_bodies.py",
        "    if len({body.signature for body in bodies}) > 1:\n",
        "    if len({body.signature for body in bodies}) > len(bodies):\n",
        ("tests/patterns/test_expert_loop.py",),
    ),
    # Dispatch and combine.
    Bug(
        "the next rank's first expert counts as this rank's",
        ALL_TO_ALL,
        "(ids < first + local)",
        "(ids <= first + local)",
        (EXCHANGE,),
    ),
    Bug(
        "a token's last rank wins, in the place of the sum",
        ALL_TO_ALL,
        "        out.index_add_(0, tokens, part)\n",
        "        out.index_copy_(0, tokens, part)\n",
        (EXCHANGE,),
    ),
    Bug(
        "the routing weights get no gradient",
        ALL_TO_ALL,
        "    return grads[0], None, grads[1], None, None\n",
        "    return grads[0], None, None, None, None\n",
        (EXCHANGE,),
    ),
    Bug(
        "a rank's experts are those of rank 0",
        SHARDS,
        "whole.narrow(0, ranks.rank() * count, count)",
        "whole.narrow(0, 0, count)",
        ("tests/parallel/test_stacked_experts.py",),
    ),
    Bug(
        "an expert's gradient is the sum of the ranks', not their mean",
        PLACING,
        "self._scaled(back, 1 / ranks)",
        "self._scaled(back, 1.0)",
        (MESHES,),
    ),
    Bug(
        "the tokens' gradient is divided twice",
        PLACING,
        "self._scaled(arguments[name], ranks)",
        "self._scaled(arguments[name], 1.0)",
        (MESHES,),
    ),
    Bug(
        "picks beyond those that were promised are dropped",
        "moe_compile/parallel/limits.py",
        "(ids >= 0).sum() <= most",
        "(ids >= 0).sum() >= 0",
        ("tests/parallel/test_limits.py",),
    ),
    Bug(
        "the gradient of an embedding's rows is the sum of the ranks', not their mean",
        EMBEDDING,
        "grads[0] / ctx.ranks",
        "grads[0]",
        (ROWS_THAT_STAY,),
    ),
    Bug(
        "replicas of an embedding's rows do not sum their gradients",
        EMBEDDING,
        "else Partial() for name in names]",
        "else Replicate() for name in names]",
        (ROWS_THAT_STAY,),
    ),
    Bug(
        "ranks that share experts do not sum their gradients",
        SHARDS,
        """else Partial() for name in names]""",
        """else Replicate() for name in names]""",
        (MESHES, "tests/parallel/test_experts.py"),
    ),
    Bug(
        "rows that hold anything are summed",
        ROWS,
        "    return own, (inverse < offs[-1])[:, None]\n",
        "    return own, (inverse <= offs[-1])[:, None]\n",
        ("tests/kernels/test_expert_rows.py", "tests/ops/test_experts.py"),
    ),
    Bug(
        "picks that live elsewhere are sorted first",
        ROWS,
        "(ids.flatten() % (num_experts + 1)).sort(stable=True)",
        "ids.flatten().sort(stable=True)",
        ("tests/kernels/test_expert_rows.py",),
    ),
    # Lowering and installing.
    Bug(
        "each rank multiplies by the shards of all",
        "passes/lower.py",
        """    if "data_ranks" in node.meta:\n""",
        """    if "data_rank" in node.meta:\n""",
        ("tests/passes/test_lower.py", MESHES),
    ),
    Bug(
        "any provider brings the tokens back",
        "passes/choose_providers.py",
        "    if node.target not in ops.JOURNEYS:\n",
        "    if node.target not in ops.JOURNEYS or unit.wanted_providers:\n",
        ("tests/passes/test_choose_providers.py", "tests/providers/test_deepep.py"),
    ),
    Bug(
        "work that draws random numbers changes places with other such work",
        "passes/overlap_shared_experts.py",
        "        if any(map(is_random, (n for n in self.graph.nodes if owner in ",
        "        if any(map(is_random, (n for n in self.graph.nodes if owner not in ",
        ("tests/passes/test_overlap_shared_experts.py",),
    ),
    Bug(
        "a chunk's bound is smaller than the chunk",
        "passes/chunk_tokens.py",
        "-(-most // chunks)",
        "most // chunks",
        ("tests/passes/test_chunk_tokens.py",),
    ),
    Bug(
        "a rewrite's result has another dtype",
        "moe_compile/rewrite/rewriter.py",
        """        if result.node.meta["val"].dtype != wanted:\n""",
        """        if result.node.meta["val"].dtype == torch.int64:\n""",
        ("tests/patterns/test_grouped_experts.py",),
    ),
    Bug(
        "a call of another form runs the captured code",
        "moe_compile/install/forward.py",
        "        if self.fits is not None and not all(self.fits(*tensors)):\n",
        "        if self.fits is not None and not any(self.fits(*tensors)):\n",
        (FORWARD,),
    ),
    Bug(
        "an attribute that changed afterwards is not looked at",
        "moe_compile/install/forward.py",
        "        if not all(_still_reads(module, *read) for read in self.reads):\n",
        "        if self.reads and not any(_still_reads(module, *read) for read in self.reads):\n",
        (FORWARD,),
    ),
    Bug(
        "hooks of a module that is no longer called are forgotten",
        "moe_compile/install/forward.py",
        "        if not all(_is_plain(module, *child) for child in self.crossed):\n",
        "        if not all(_is_plain(module, *child) for child in self.crossed[1:]):\n",
        (FORWARD,),
    ),
)

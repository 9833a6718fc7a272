"""The rewrite engine: patterns, the matcher, facts and the pipeline of passes."""

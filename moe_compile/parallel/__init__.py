"""Several ranks: what a mesh means, the experts' shards, FSDP2, and norms across meshes."""

"""Random mixture-of-experts blocks as people write them, and a judge of `optimize` on them."""

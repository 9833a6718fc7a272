"""Random mixture-of-experts blocks, written as people write them, and a judge of what we make of them."""

"""Proofs and checks that a rewrite means the same as its original."""

"""Install: cut a rewritten region out of a unit's graph and make it its owner's forward."""

"""How well a set of edited pictures does: features, and the measures computed from them."""

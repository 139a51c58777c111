"""Checkpoint files: safe reading, atomic writing, names, merging, conversion. Strings and tensors only, no modules."""

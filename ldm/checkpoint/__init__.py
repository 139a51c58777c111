"""Checkpoints as files: safe reading, atomic writing, key maps, surgery. Strings and tensors only, no modules."""

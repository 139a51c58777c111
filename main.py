#!/usr/bin/env python
"""Train or resume: a config to a run directory with checkpoints, curves and image grids."""

from __future__ import annotations

from ldm.training.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

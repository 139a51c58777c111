#!/usr/bin/env python
"""Edit an image: replace the hole of a scene by what an exemplar shows, or by what a prompt says.

    python inference.py                                    # the bundled example with the bundled model
    python inference.py --image scene.jpg --mask hole.png --reference dog.jpg
    python inference.py --image scene.jpg --box 120,80,360,300 --reference dog.jpg
    python inference.py --image scene.jpg --mask hole.png --prompt "a dog" --config … --checkpoint …   # docs/text.md
    python inference.py --jobs jobs.csv --batch-size 16    # a row for each edit: docs/editing.md
    python inference.py --plms --config configs/v1.yaml --checkpoint model.ckpt --image … --mask … --reference …

The options of the original's scripts/inference.py are accepted in its spelling, too.
"""

from __future__ import annotations

from ldm.editing.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

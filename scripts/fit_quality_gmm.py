"""Fit the Gaussian mixture of the quality score (QS) to a folder of real images.

    python scripts/fit_quality_gmm.py coco/test2017_square --features clip --out gmm.safetensors

The published figures use one particular mixture. Scores under a mixture of your own rank sets of images in the
same way, but are not comparable with published ones, and tables say so.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import UserError, check_writable

if TYPE_CHECKING:
    import numpy as np

    from ldm.evaluation.quality import GaussianMixture

COVARIANCES = ("full", "tied", "diag", "spherical")
MAX_ITERATIONS = 100


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="real images, searched with its subfolders")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="mixture to write (.safetensors)")
    parser.add_argument(
        "--features",
        default="efficientnet-lite0",
        metavar="SPEC",
        help="as for scripts/evaluate.py; the paper's is clip; default: %(default)s",
    )
    parser.add_argument("--components", type=int, default=20, metavar="K", help="default: %(default)s")
    parser.add_argument(
        "--covariance",
        choices=COVARIANCES,
        default="full",
        help="full needs many more images per component than the network has channels (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starting point (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="fail if an image cannot be read; default: leave it out")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N images, by name")
    parser.add_argument("--cache", metavar="FOLDER", help="as for scripts/evaluate.py, which shares it")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="threads that read images (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        fit(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def fit(args: argparse.Namespace) -> None:
    """Read the images, fit, and write the mixture."""
    from ldm.editing.editor import pick_device
    from ldm.evaluation.cache import open_cache
    from ldm.evaluation.features import View, extract, load_network
    from ldm.images import find_images

    if args.components < 1 or (args.limit is not None and args.limit < 1):
        raise UserError("--components and --limit: expected 1 or more")
    paths = find_images(args.folder)[: args.limit]
    check_number(args, len(paths))
    check_writable(args.out.resolve().parent)
    unreadable: dict[Path, str] = {}
    network = load_network(args.features, pick_device(args.device))
    features = extract(
        network,
        [View(path, "whole") for path in paths],
        cache=open_cache(args.cache),
        batch_size=args.batch_size,
        num_workers=args.workers,
        label="features",
        unreadable=None if args.strict else unreadable,
    )
    if unreadable:
        reason = next(iter(unreadable.values()))
        print(f"warning: {len(unreadable)} images are left out, the first: {reason}", file=sys.stderr)
        paths = [path for path in paths if path not in unreadable]
        check_number(args, len(paths))
    per_component = len(paths) / args.components
    if args.covariance == "full" and per_component < features.shape[1]:
        print(
            f"note: {per_component:.0f} images per component for full covariances of {features.shape[1]} channels: "
            "the density is very peaked; --covariance diag needs fewer",
            file=sys.stderr,
        )
    mixture = fit_mixture(
        features,
        components=args.components,
        covariance=args.covariance,
        seed=args.seed,
        provenance={
            "network": network.name,
            "preprocessing": network.preprocessing["whole"],
            "folder": args.folder.resolve().name,
            "pictures": str(len(paths)),
            "pictures_sha256": content_digest(paths),
        },
    )
    mixture.save(args.out)
    print(f"{args.out}: {args.components} {args.covariance} components, {len(paths)} images, {network.name}")


def check_number(args: argparse.Namespace, number: int) -> None:
    """Raise a UserError if there are too few images for the components."""
    if number < 2 * args.components:
        raise UserError(
            f"{args.folder}: got {number} image(s) for {args.components} components, expected at least twice as many; "
            "give more images or fewer --components"
        )


def content_digest(paths: list[Path]) -> str:
    """SHA-256 over the files' SHA-256 in ascending order, so that names and folders do not matter."""
    from tqdm import tqdm

    from ldm.checkpoint.io import sha256_file

    digests = sorted(sha256_file(path) for path in tqdm(paths, desc="digest", unit="file", disable=None, leave=False))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def fit_mixture(
    features: np.ndarray, *, components: int, covariance: str, seed: int, provenance: dict[str, str]
) -> GaussianMixture:
    """Expectation maximisation from k-means, with scikit-learn's own settings.

    Args:
        features: (N, D).
        components: K.
        covariance: one of COVARIANCES.
        seed: of k-means.
        provenance: what the mixture's own is to say beside the settings.

    Raises:
        UserError: scikit-learn is not installed, or the features allow no such mixture.
    """
    try:
        import sklearn
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Estimator
    except ImportError as error:
        raise UserError(f'{error}: fitting needs the "eval" extra; do pip install -e ".[eval]"') from error
    from tqdm import tqdm

    from ldm.evaluation.quality import GaussianMixture

    # A few iterations at a time, each going on where the last stopped, so that there is something to show.
    estimator: Any = Estimator(
        components, covariance_type=covariance, random_state=seed, max_iter=MAX_ITERATIONS // 20, warm_start=True
    )
    x, iterations = features.astype("float64"), 0
    with warnings.catch_warnings(), tqdm(desc="fit", total=MAX_ITERATIONS, unit="iteration", disable=None) as bar:
        warnings.simplefilter("ignore", ConvergenceWarning)
        while iterations < MAX_ITERATIONS and not getattr(estimator, "converged_", False):
            try:
                estimator.fit(x)
            except ValueError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"no mixture could be fitted ({reason}); try fewer --components or --covariance diag"
                ) from error
            iterations += estimator.n_iter_
            bar.update(estimator.n_iter_)
    if not estimator.converged_:
        print(f"note: not converged after {iterations} iterations", file=sys.stderr)
    settings = {
        "refitted": "yes",
        "components": str(components),
        "covariance_type": covariance,
        "seed": str(seed),
        "iterations": f"{iterations}, {'converged' if estimator.converged_ else 'not converged'}",
        "scikit-learn": sklearn.__version__,
    }
    return GaussianMixture(estimator, settings | provenance)


if __name__ == "__main__":
    raise SystemExit(main())

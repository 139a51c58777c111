#!/usr/bin/env python
"""Serve Paint by Example as a web page: paint the hole, show an exemplar, run.

    python scripts/web_demo.py                                     # the bundled model, for this machine only
    python scripts/web_demo.py --config configs/v1.yaml --checkpoint model.ckpt
    python scripts/web_demo.py --host 0.0.0.0 --auth ada:secret    # for others, behind a password

Needs the extra `demo`. docs/web.md describes the page, its limits and its API.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.editing.cli import add_model_options, add_safety_options, load_editor

if TYPE_CHECKING:
    from ldm.web.service import EditService

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SWEEP_SECONDS = 60.0  # time between two searches for old files


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser.add_argument_group("model", "the bundled small one by default"))
    add_safety_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 serves everyone; default: %(default)s")
    server.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    server.add_argument(
        "--auth",
        default=os.environ.get("WEB_DEMO_AUTH"),
        metavar="USER:PASSWORD",
        help="password of the page; safer in the environment variable WEB_DEMO_AUTH, which other users do not see",
    )
    limits = parser.add_argument_group("limits")
    for option, kind, default, what in (
        ("--max-megapixels", float, 30, "pixels of an image"),
        ("--max-megabytes", int, 40, "size of a file"),
        ("--max-seconds", float, 300, "time of painting"),
        ("--max-samples", int, 8, "candidates of an edit"),
        ("--max-waiting", int, 16, "waiting requests"),
        ("--keep-minutes", float, 90, "time that unused files are kept"),
    ):
        limits.add_argument(option, type=kind, default=default, metavar="N", help=f"{what}; default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    user, colon, password = (args.auth or "").partition(":")
    if args.auth and not (user and colon and password):
        parser.error("--auth: expected USER:PASSWORD")
    if args.config and not args.checkpoint:
        parser.error("got --config without --checkpoint; name the weights too (--checkpoint FILE)")
    counts = (args.max_megapixels, args.max_megabytes, args.max_seconds, args.max_samples, args.max_waiting)
    if not all(0 < count < math.inf for count in (*counts, args.keep_minutes)):
        parser.error("limits: expected more than 0, and finite numbers")
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port: got {args.port}, expected a number from 1 to 65535")
    longest_wait = (args.max_waiting + 1) * args.max_seconds / 60
    if args.keep_minutes < longest_wait:
        parser.error(
            f"--keep-minutes: got {args.keep_minutes:g}, and a request may wait for {longest_wait:g} minutes, "
            "(--max-waiting + 1) x --max-seconds; keep files longer, or lower the others"
        )
    if args.host not in LOOPBACK and not args.auth:
        print(f"warning: everyone can use the page at {args.host}; --auth asks for a password", file=sys.stderr)
    try:
        serve(args, (user, password) if args.auth else None)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        print('error: Gradio is missing; pip install -c constraints.txt -e ".[demo]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped")
    return 0


def serve(args: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    """Load the model and serve the page until Ctrl-C or SIGTERM."""
    from ldm.editing.safety import load_filter
    from ldm.web.service import EditService, Limits, Source

    limits = Limits(
        pixels=round(args.max_megapixels * 1e6),
        megabytes=args.max_megabytes,
        seconds=args.max_seconds,
        samples=args.max_samples,
        waiting=args.max_waiting,
        keep_seconds=round(args.keep_minutes * 60),
    )

    def make_service(folder: Path) -> EditService:
        editor = load_editor(args)
        files = {name: str(path) for name in ("checkpoint", "config", "decoder") if (path := getattr(args, name))}
        source = Source(**files, safety=args.safety, watermark=args.watermark)
        content_filter = load_filter(args.safety, editor.device) if args.safety else None
        return EditService(editor, folder, limits, source, content_filter)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: temporary files are removed
    with serving(make_service, args.host, args.port, auth) as url:
        print(f"the page is at {url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()


@contextmanager
def serving(
    make_service: Callable[[Path], EditService], host: str, port: int | None, auth: tuple[str, str] | None = None
) -> Iterator[str]:
    """Serve the page inside the block and yield its address; its temporary files are removed afterwards.

    The service gets a folder for its files. A port of None is the first free one from 7860 on.
    """
    from ldm.web.page import LAUNCH, Page

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also for Gradio's parts that do not know the page's setting
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio looks for new versions of itself at each start
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="paint-by-example-", ignore_cleanup_errors=True)
        folder = os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(temporary)
        service = stack.enter_context(closing(make_service(Path(folder))))
        page = Page(service).blocks.queue(max_size=service.limits.waiting, api_open=False)
        address: dict[str, Any] = {"server_name": host, "server_port": port, "auth": auth}
        try:
            _, url, _ = page.launch(max_file_size=service.limits.megabytes * 2**20, **address, **LAUNCH)
        except OSError:
            raise OSError(f"{host}:{port or '7860 to 7959'}: taken or not this machine's; see --port") from None
        stack.callback(page.close, verbose=False)
        spared, stopped = set(service.folder.rglob("*")), threading.Event()  # the page's own images stay
        stack.callback(stopped.set)

        def sweep() -> None:
            while not stopped.wait(SWEEP_SECONDS):
                service.sweep(spared)

        threading.Thread(target=sweep, daemon=True).start()
        yield url


if __name__ == "__main__":
    raise SystemExit(main())

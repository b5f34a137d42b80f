"""Serve the page of this folder, with a model from `mowa export --to onnx`, to browsers on this machine.

    npm ci --prefix examples/browser                          once, installs ONNX Runtime for browsers
    python examples/browser/serve.py FOLDER [--port 8000]

It needs only Python. Any other web server works if it sends the same headers: the first two allow the page to use
several threads, the third prevents it from contacting other servers.
"""

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web"
SAMPLE = HERE.parent / "dzien-dobry.flac"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "default-src 'self' blob: data:; script-src 'self' 'wasm-unsafe-eval'",
    "Cache-Control": "no-cache",
}


class Page(SimpleHTTPRequestHandler):
    """/ is this folder, /model/ the exported one, and /sample.flac a recording."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".flac": "audio/flac",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: object, model: Path) -> None:
        self.model = model
        super().__init__(*args, directory=str(HERE))

    def translate_path(self, path: str) -> str:
        requested = Path(super().translate_path(path))  # always below HERE
        if requested == HERE / "sample.flac":
            return str(SAMPLE)
        if requested.parent == HERE / "model":
            return str(self.model / requested.name)
        return str(requested)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_request(self, *_: object) -> None:
        """Log errors only."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the page with a model to browsers on this machine.")
    parser.add_argument("folder", type=Path, help="folder that `mowa export --to onnx` wrote")
    parser.add_argument("--port", type=int, default=8000, help="0: a free port (default: 8000)")
    args = parser.parse_args()
    if not (args.folder / "mowa.json").is_file():
        command = f"mowa export pl-tiny --to onnx --scheme int8-dynamic -o {args.folder}"
        sys.exit(f"{args.folder} is not an export; create one with: {command}")
    if not RUNTIME.is_dir():
        sys.exit(f"ONNX Runtime for browsers is not installed: npm ci --prefix {HERE}")
    with ThreadingHTTPServer(("127.0.0.1", args.port), partial(Page, model=args.folder.resolve())) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()

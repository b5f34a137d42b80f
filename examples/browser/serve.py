"""The page of this folder, with a model that `mowa export --to onnx` wrote, for browsers on this machine.

    npm ci --prefix examples/browser                          once: ONNX Runtime for browsers
    python examples/browser/serve.py FOLDER [--port 8000]

It needs nothing but Python, and any other web server can take its place that sends the same headers: the first two let
the page use more than one processor, the third keeps it from reaching any other server.
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
    """/ is this folder, /model/ the exported one, /sample.flac the recording that comes with the examples."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".flac": "audio/flac",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: object, model: Path) -> None:
        self.model = model
        super().__init__(*args, directory=str(HERE))

    def translate_path(self, path: str) -> str:
        asked = Path(super().translate_path(path))  # below HERE, whatever was asked for
        if asked == HERE / "sample.flac":
            return str(SAMPLE)
        if asked.parent == HERE / "model":
            return str(self.model / asked.name)
        return str(asked)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_request(self, *_: object) -> None:
        """Only what goes wrong is worth a line."""


def main() -> None:
    asked = argparse.ArgumentParser(description="Serve the page with a model to browsers on this machine.")
    asked.add_argument("folder", type=Path, help="what `mowa export --to onnx` wrote")
    asked.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    given = asked.parse_args()
    if not (given.folder / "mowa.json").is_file():
        sys.exit(
            f"{given.folder} holds no export: mowa export pl-tiny --to onnx --scheme int8-dynamic -o {given.folder}"
        )
    if not RUNTIME.is_dir():
        sys.exit(f"ONNX Runtime for browsers is not there: npm ci --prefix {HERE}")
    with ThreadingHTTPServer(("127.0.0.1", given.port), partial(Page, model=given.folder.resolve())) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()

"""A server that answers at once what ours would: labels, and chats as streams."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LABELS = {"image": "positive", "multimodal": "neutral"}


class Target:
    """What it has seen, and how it answers.

    Attributes:
        places: requests that are answered at once; the others wait for a place.
        wait_s: how long an answer takes.
        is_cut: streams end without [DONE].
    """

    def __init__(self):
        self.url = ""
        self.bodies = []
        self.places, self.wait_s, self.is_cut = threading.Semaphore(64), 0.0, False
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @contextmanager
    def counted(self, body):
        with self._lock:
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            with self.places:
                time.sleep(self.wait_s)
                yield
        finally:
            with self._lock:
                self._at_once -= 1

    def label(self, body):
        ratio = body.get("retention_ratio", 1.0)
        retention = {"ratio": ratio, "selector": "cls", "kept": round(64 * ratio), "patches": 64}
        return {
            "model": body.get("model", "demo"),
            "label_structure": body.get("label_structure", "sentiment"),
            "labels": LABELS,
            "retention": retention,
            "usage": {"prompt_tokens": 20 + retention["kept"]},
        }

    def chunks(self, body):
        for part in ("pos", "itive"):
            yield {"model": body["model"], "choices": [{"delta": {"content": part}}]}
        yield {"model": body["model"], "choices": [], "usage": {"prompt_tokens": 33}}


def _handler(target):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer({"data": [{"id": "demo"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with target.counted(body):
                if body.get("stream"):
                    self._stream(body)
                else:
                    self._answer(target.label(body))

        def _answer(self, body):
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _stream(self, body):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for chunk in target.chunks(body):
                self._chunk(f"data: {json.dumps(chunk)}\n\n")
                time.sleep(0.05)
            if not target.is_cut:
                self._chunk("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, text):
            raw = text.encode()
            self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
            self.wfile.flush()

        def log_message(self, *args):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 256


@contextmanager
def load_target():
    """A target on a free port."""
    target = Target()
    server = Server(("127.0.0.1", 0), _handler(target))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    target.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield target
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

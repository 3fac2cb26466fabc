"""A server that streams answers as OpenAI's protocol has them: python -m tests.benchmarks.streaming --port PORT

An answer is one word, over and over. To the prompt "refused" it is status 400, to "broken" there is an error in the
middle of the stream, and to "short" there is a token less than was asked for.
"""

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORD, PAUSE = "é ", 0.002
"""A token, and the seconds before it."""


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.say({"data": [{"id": "a model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = "messages" in asked
        prompt = json.dumps(asked["messages"]) if is_chat else asked["prompt"]
        assert asked["model"] == "a model"
        if prompt == "refused":
            self.say({"error": {"message": "no such field"}}, 400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        n_tokens = asked["max_tokens"] - (prompt == "short")
        for i in range(n_tokens):
            time.sleep(PAUSE)
            if i and prompt == "broken":
                self.event({"error": {"message": "out of memory"}})
            self.event({"choices": [{"delta": {"content": WORD}} if is_chat else {"text": WORD}]})
        self.event({"choices": [], "usage": {"completion_tokens": n_tokens, "prompt_tokens": len(prompt)}})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def event(self, content: dict[str, Any]) -> None:
        """Sends an event in two chunks of the transfer, which are no lines."""
        data = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
        for part in (data[:20], data[20:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    def say(self, content: dict[str, Any], status: int = 200) -> None:
        """Sends a whole response."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Streaming(ThreadingHTTPServer):
    """The server; a thread for each request."""

    request_queue_size = 64


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    Streaming(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()

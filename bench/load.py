"""Load: many requests at once by wrk, one at a time by a raw socket."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

from subjects import KEY

REQUESTS_LUA = Path(__file__).parent / "requests.lua"
PROMPT = "Who may pass the gate, and when does it open? ".ljust(500, "x")


def body(model, stream):
    """A chat completion request with a prompt of 500 bytes."""
    request = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    return json.dumps(request | ({"stream": True} if stream else {}), separators=(",", ":"))


def wrk(port, request, connections, seconds, key):
    """Runs wrk with one thread; its counts. Raises when an answer broke off."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(REQUESTS_LUA),
               f"http://127.0.0.1:{port}/v1/chat/completions"]
    environment = {"PATH": os.environ.get("PATH", ""), "BENCH_BODY": request, "BENCH_KEY": key}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 40)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"wrk failed: {ran.stdout[-500:]}{ran.stderr[-500:]}")
    result = json.loads(lines[0].removeprefix("RESULT "))
    if result["broken"] or not result["requests"]:
        raise RuntimeError(f"wrk on port {port}: {result}")
    return result


class Caller:
    """One keep-alive connection, one request at a time."""

    def __init__(self, port, request):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(request)}\r\n\r\n")
        self.request = (head + request).encode()

    def first_byte(self):
        """Seconds from the request to the first byte of the answer's body; reads the answer to its end."""
        started = time.perf_counter()
        self.socket.sendall(self.request)
        answer = b""
        while len(head_and_body := answer.split(b"\r\n\r\n", 1)) < 2 or not head_and_body[1]:
            answer += self._more()
        took = time.perf_counter() - started
        self._rest(*head_and_body)
        return took

    def _rest(self, head, received):
        status, _, fields = head.partition(b"\r\n")
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode()}: {received[:300].decode(errors='replace')}")
        lengths = [line for line in fields.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if lengths:
            length = int(lengths[0].split(b":")[1])
            while len(received) < length:
                received += self._more()
        else:
            while not received.endswith(b"0\r\n\r\n"):
                received += self._more()

    def _more(self):
        data = self.socket.recv(65536)
        if not data:
            raise RuntimeError("the connection was closed in the middle of an answer")
        return data

    def close(self):
        """Closes the connection."""
        self.socket.close()

"""Starts the real binary on free ports and ends it again."""

import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
START_SECONDS_MAX = 30
END_SECONDS_MAX = 30


def binary() -> str:
    """`TOLLGATE_BIN`, else the debug build."""
    target = os.environ.get("CARGO_TARGET_DIR") or HERE.parent.parent / "target"
    path = os.environ.get("TOLLGATE_BIN") or str(pathlib.Path(target) / "debug" / "tollgate")
    if not os.access(path, os.X_OK):
        sys.exit(f"{path} is not there: build it with `cargo build -p tollgate`, or set TOLLGATE_BIN")
    return path


class Gateway:
    """One process of the gateway. `data` and `admin` are the addresses it listens on."""

    def __init__(self, config=HERE / "tollgate.yml"):
        self.config = config

    def __enter__(self):
        # Of the environment only what a process needs: a stray API_KEYS would change the configuration.
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        command = [binary(), "serve", "-c", str(self.config)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=kept)
        self.lines = []
        listening = queue.Queue()
        self.reader = threading.Thread(target=self._read, args=(listening,), daemon=True)
        self.reader.start()
        addresses = {}
        try:
            while len(addresses) < 2:
                planes, address = listening.get(timeout=START_SECONDS_MAX)
                # Two listeners, or one that is "data and admin".
                addresses.update(dict.fromkeys(planes.split(" and "), address))
        except (queue.Empty, TypeError):
            self.__exit__()
            raise RuntimeError("the gateway did not start:\n" + "".join(self.lines)) from None
        self.data, self.admin = addresses["data"], addresses["admin"]
        return self

    def _read(self, listening):
        for line in self.process.stderr:
            self.lines.append(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("message") == "listening":
                listening.put((record["plane"], record["address"]))
        # The end of the log: whoever still waits need not.
        listening.put(None)

    def __exit__(self, *_):
        # A second signal ends it without the seconds in which a load balancer would notice the first.
        for _ in range(2):
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    pass
        try:
            self.process.wait(timeout=END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=END_SECONDS_MAX)
        self.process.stderr.close()

    def answered(self, code: int, endpoint: str = "/v1/chat/completions") -> int:
        """How many requests ended with this status: `tollgate_http_requests_total`."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=10) as response:
            text = response.read().decode()
        found = re.findall(r"^tollgate_http_requests_total\{([^}]*)\} (\d+)", text, re.MULTILINE)
        wanted = {f'endpoint="{endpoint}"', f'code="{code}"'}
        return sum(int(value) for labels, value in found if wanted <= set(labels.split(",")))

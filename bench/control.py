"""What much control data costs: 100,000 keys and a million subjects, without Redis and with one of its own.

    TOLLGATE_BIN=target/release/tollgate bench/control.py [--keys N] [--subjects N] [--store memory|redis]

Needs a release build, wrk and redis-server. Prints one line per figure; nothing is judged.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from process import Process, free_ports

HERE = pathlib.Path(__file__).resolve().parent
BATCH = 1_000
LOOKUPS = 3_000
CONFIG = """
server: {{ listen: '127.0.0.1:{data}', admin: '127.0.0.1:{admin}', trusted_proxies: [127.0.0.0/8] }}
users: [{{ name: bench, keys: [sk-bench] }}]
limits: [{{ name: address, per: ip, limit: 100000/day }}]
models: [{{ name: chat, providers: [{{ type: simulated, completion_tokens: 1 }}] }}]
settings: {{ state: {folder}/tollgate.state }}
{redis}
"""
CHAT = '{"model":"chat","messages":[{"role":"user","content":"Hi"}]}'


class Gateway:
    """One that is started again with what it knows."""

    def __init__(self, folder, redis):
        self.data, self.admin = free_ports(2)
        self.folder, self.process = folder, None
        path = pathlib.Path(folder) / "tollgate.yml"
        path.write_text(CONFIG.format(data=self.data, admin=self.admin, folder=folder, redis=redis))
        self.command = [os.environ["TOLLGATE_BIN"], "serve", "-c", str(path)]

    def start(self):
        """Seconds until it answers."""
        began = time.monotonic()
        self.process = Process(self.command, self.folder)
        while True:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/readyz")[0] == 200:
                    return time.monotonic() - began
            time.sleep(0.002)

    def stop(self):
        self.process.child.kill()
        self.process.child.wait()

    def ask(self, method, path, body=None):
        """Status, body, and seconds, of a question to the admin API."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=60)
        began = time.monotonic()
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            text = response.read()
            return response.status, text, time.monotonic() - began
        finally:
            connection.close()

    def said(self, method, path, body=None):
        status, text, took = self.ask(method, path, body)
        assert status < 300, (method, path, status, text[:300])
        return json.loads(text), took

    def callers(self, keys, count=LOOKUPS):
        """Microseconds of requests one after another, with each of these keys in turn: median and 99th percentile."""
        connection = http.client.HTTPConnection("127.0.0.1", self.data, timeout=60)
        took = []
        for number in range(count):
            headers = {"Authorization": f"Bearer {keys[number * 7919 % len(keys)]}"}
            began = time.monotonic()
            connection.request("POST", "/v1/chat/completions", CHAT, headers)
            response = connection.getresponse()
            response.read()
            took.append((time.monotonic() - began) * 1e6)
            assert response.status == 200, response.status
        connection.close()
        return f"p50 {statistics.median(took):.0f} µs, p99 {sorted(took)[len(took) * 99 // 100]:.0f} µs"


def tell(what, value):
    print(f"  {what:<58} {value}", flush=True)


def milliseconds(values):
    return ", ".join(f"{value * 1000:.0f}" for value in values) + " ms"


def keys(gateway, count):
    names = [f"sk-many-{number}" for number in range(count)]
    digest = lambda name: "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    began, took = time.monotonic(), 0
    for first in range(0, count, BATCH):
        batch = [{"hash": digest(name), "user": "bench", "limits": ["100000/minute"]} for name in names[first:first + BATCH]]
        _, took = gateway.said("POST", "/admin/keys/import", json.dumps({"keys": batch}))
        if first == 0:
            tell(f"a request, with {BATCH} keys", gateway.callers(names[:BATCH]))
    tell(f"import of {count} keys, {BATCH} at a time", f"{time.monotonic() - began:.1f} s, the last {took:.2f} s")
    tell(f"a request, with {count} keys", gateway.callers(names))
    gateway.stop()
    tell("start", milliseconds([gateway.start()]))
    tell("resident", f"{resident(gateway)} MiB")
    assert gateway.callers(names[-1:], 1)
    cursor, pages = "", []
    while cursor is not None and len(pages) < count // 1000:
        page, took = gateway.said("GET", f"/admin/keys?limit=1000&cursor={cursor}")
        cursor = page["next_cursor"]
        pages.append(took)
    tell("a page of 1,000 keys: first, middle, last", milliseconds([pages[0], pages[len(pages) // 2], pages[-1]]))
    tell("one more key, in force", milliseconds([gateway.said("POST", "/admin/keys", "{}")[1]]))
    tell("a limit more, in force", milliseconds([gateway.said("PUT", "/admin/limits/more", '{"per":"user","limit":"1000000000/day"}')[1]]))


def resident(gateway):
    status = pathlib.Path(f"/proc/{gateway.process.child.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


def subjects(gateway, count):
    made = 0
    while made < count:
        environment = dict(os.environ, BENCH_FROM=str(made))
        subprocess.run(["wrk", "-t1", "-c32", "-d10s", "-s", str(HERE / "addresses.lua"),
                        f"http://127.0.0.1:{gateway.data}/v1/chat/completions"],
                       env=environment, stdout=subprocess.DEVNULL, check=True)
        made = gateway.said("GET", "/admin/rate-limit/stats")[0]["stats"]["total_requests"]
    time.sleep(2)
    first = [gateway.said("GET", "/admin/rate-limit/stats")[1] for _ in range(5)]
    tell(f"statistics, {made} requests of as many addresses", milliseconds(first))
    tell("a request, before", gateway.callers(["sk-bench"]))
    during, stop, pages, seen = [], threading.Event(), [], 0

    def call():
        while not stop.is_set():
            during.append(gateway.callers(["sk-bench"], 1_000))

    caller = threading.Thread(target=call)
    caller.start()
    cursor, began = "", time.monotonic()
    while cursor is not None:
        page, took = gateway.said("GET", f"/admin/rate-limit/stats?limit=1000&cursor={cursor}")
        cursor, seen = page["next_cursor"], seen + len(page["stats"]["current_rates"])
        pages.append(took)
    stop.set()
    caller.join()
    tell(f"a walk over all: {seen} told in {len(pages)} pages", f"{time.monotonic() - began:.1f} s")
    tell("a page of 1,000 of it: median, slowest", milliseconds([statistics.median(pages), max(pages)]))
    tell("a request, during that", during[len(during) // 2])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--subjects", type=int, default=1_000_000)
    parser.add_argument("--store", choices=["memory", "redis"], help="only this one")
    asked = parser.parse_args()
    if "TOLLGATE_BIN" not in os.environ:
        sys.exit("set TOLLGATE_BIN to a release build")
    for store in [asked.store] if asked.store else ["memory", "redis"]:
        print(f"{store}:")
        with tempfile.TemporaryDirectory() as folder:
            redis = None
            section = ""
            if store == "redis":
                port = free_ports(1)[0]
                redis = Process(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""], folder)
                section = f"dependencies: {{ redis: {{ url: 'redis://127.0.0.1:{port}/0', timeout: 1s }} }}"
            gateway = Gateway(folder, section)
            try:
                gateway.start()
                keys(gateway, asked.keys)
                subjects(gateway, asked.subjects)
            finally:
                gateway.stop()
                if redis:
                    redis.child.kill()
                    redis.child.wait()


if __name__ == "__main__":
    main()

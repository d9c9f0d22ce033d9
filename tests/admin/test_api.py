"""Every endpoint of the admin API as its description has it, by plain HTTP: in memory, and on a Redis with two instances.

On Redis everything is changed on one instance and looked for on the other, where it must be in force within a second, while
the connections over which instances tell each other of changes are killed all the time. Standard library only.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from urllib.parse import quote

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))
from gateway import Gateway

EVERYWHERE = 1.0
SOON = 10.0
KEY = {"X-Admin-Key": "canary-of-root"}
CHAT = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "May I pass?"}]})


class Answer:
    def __init__(self, response, body):
        self.status, self.headers = response.status, dict(response.getheaders())
        self.text = body.decode()

    def json(self):
        return json.loads(self.text)


def http_ask(address, method, path, headers, body=None):
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=SOON)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        streams = "event-stream" in (response.getheader("content-type") or "")
        return Answer(response, b"" if streams else response.read())
    finally:
        connection.close()


class Fleet:
    """One gateway, or two on one Redis; what is changed is changed on the first and looked for on the last."""

    def __init__(self, gateways, name):
        self.gateways, self.name, self.asked, self.slowest = gateways, name, set(), 0.0
        self.one, self.other = gateways[0], gateways[-1]
        document = http_ask(self.one.admin, "GET", "/admin/openapi.json", KEY).json()
        self.operations = {(m.upper(), p) for p, methods in document["paths"].items() for m in methods}

    def ask(self, method, path, body=None, want=200, on=None, headers=None):
        body = body if body is None or isinstance(body, str) else json.dumps(body)
        answer = http_ask((on or self.one).admin, method, path, KEY | (headers or {}), body)
        assert answer.status == want, f"{self.name}: {method} {path}: {answer.status} {answer.text}"
        if 200 <= answer.status < 300:
            self.asked |= {operation for operation in self.operations if fits(operation, method, path)}
        elif answer.status >= 400:
            assert answer.headers["content-type"] == "application/problem+json", answer.headers
            assert answer.json()["status"] == answer.status
        return answer

    def chat(self, key, on=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = http_ask((on or self.other).data, "POST", "/v1/chat/completions", headers, CHAT)
        return answer.status

    def becomes(self, what, right, within=EVERYWHERE):
        """Waits until something is so on the other instance, but no longer than it may take."""
        began = time.monotonic()
        while not right():
            took = time.monotonic() - began
            assert took < within, f"{self.name}: after {took:.2f} s still not: {what}"
            time.sleep(0.01)
        if within == EVERYWHERE:
            self.slowest = max(self.slowest, time.monotonic() - began)


def fits(operation, method, path):
    """Whether a request is for an operation. A name may have slashes, but not where something follows it."""
    pattern = re.sub(r"\\\{[^}]*\\\}", "[^?]+", re.escape(operation[1]))
    return operation[0] == method and re.fullmatch(pattern, path.split("?")[0]) is not None


def fixed_shapes(fleet):
    """The five that existing scripts parse: the fields they know, with the values they expect."""
    answer = fleet.ask("PUT", "/admin/rate-limit/config",
                       {"endpoint": "/v1/chat/completions", "requests": 100, "window": 60}).json()
    assert answer == {"status": "success", "message": "Rate limit configuration updated",
                      "endpoint": "/v1/chat/completions", "requests": 100, "window_seconds": 60}, answer
    name = "endpoint:/v1/chat/completions"
    shown = lambda: http_ask(fleet.other.admin, "GET", f"/admin/limits/{name}", KEY)
    fleet.becomes("a limit per endpoint", lambda: shown().status == 200)
    fleet.becomes("a request of alice", lambda: fleet.chat("sk-canary-of-alice") == 200)
    stats = lambda: fleet.ask("GET", "/admin/rate-limit/stats", on=fleet.other).json()
    subject = "endpoint:/v1/chat/completions:127.0.0.1"
    fleet.becomes("statistics", lambda: subject in stats()["stats"]["current_rates"])
    said = stats()
    assert said["status"] == "success" and said["stats"]["total_requests"] >= 1, said
    rate = said["stats"]["current_rates"][subject]
    assert rate["key"] == f"rate_limit:{subject}" and rate["limit"] == 100 and rate["window"] == "1m", rate
    assert 0 <= rate["reset_time"] - time.time() <= 61 and rate["current_count"] >= 1, rate
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said["stats"]["last_update"])
    clear = f"/admin/rate-limit/clear?key={quote('rate_limit:' + subject)}"
    answer = fleet.ask("POST", clear).json()
    assert answer == {"status": "success", "message": "Rate limit cleared", "key": f"rate_limit:{subject}",
                      "existed": True}, answer
    redis = fleet.ask("GET", "/admin/redis/status").json()["redis"]
    if fleet.one is fleet.other:
        assert redis == {"enabled": False, "connected": False, "addr": "", "db": 0, "pool_size": 0}, redis
    else:
        assert redis["enabled"] and redis["connected"] and redis["pool_size"] >= 1, redis
    config = fleet.ask("GET", "/admin/config").json()
    assert config["config"]["server"]["admin_key"] == "***" and config["origins"], config
    fleet.ask("DELETE", f"/admin/limits/{name}", want=204)
    fleet.becomes("its end", lambda: shown().status == 404)


def keys(fleet):
    fleet.ask("POST", "/admin/users", {"name": "carol", "team": "red"}, want=201)
    user = lambda: http_ask(fleet.other.admin, "GET", "/admin/users/carol", KEY)
    fleet.becomes("a user", lambda: user().status == 200)
    fleet.ask("PATCH", "/admin/users/carol", {"tier": "free"})
    fleet.becomes("the tier of a user", lambda: user().json().get("tier") == "free")
    assert fleet.ask("GET", "/admin/users/carol").json()["source"] == "admin"
    tried = fleet.ask("POST", "/admin/keys?dry_run=true", {"user": "carol"}, want=201).json()
    made = fleet.ask("POST", "/admin/keys", {"user": "carol", "name": "laptop"}, want=201).json()
    path = f"/admin/keys/{made['id']}"
    fleet.becomes("a key", lambda: fleet.chat(made["key"]) == 200)
    assert fleet.chat(tried["key"]) == 401, "a dry run makes nothing"
    etag = fleet.ask("GET", path).headers["etag"]
    fleet.ask("PATCH", path, {"limits": ["1/day"]}, headers={"If-Match": etag})
    fleet.ask("PATCH", path, {"name": "late"}, want=412, headers={"If-Match": etag})
    fleet.becomes("a limit of a key", lambda: fleet.chat(made["key"]) == 429)
    fleet.ask("PATCH", path, {"limits": None})
    rotated = fleet.ask("POST", f"{path}/rotate", {"overlap": "1h"}).json()
    fleet.becomes("a key that was rotated", lambda: fleet.chat(rotated["key"]) == 200)
    fleet.becomes("its limit's end", lambda: fleet.chat(made["key"]) == 200)
    fleet.ask("DELETE", "/admin/users/carol", want=409)
    fleet.ask("POST", f"{path}/revoke")
    fleet.becomes("a revocation", lambda: fleet.chat(rotated["key"]) == fleet.chat(made["key"]) == 401)
    fleet.ask("DELETE", path, want=204)
    fleet.ask("GET", path, want=404)
    digest = "0123456789abcdef" * 4
    taken = fleet.ask("POST", "/admin/keys/import", {"keys": [{"hash": f"sha256:{digest}"}]}, want=201).json()
    assert taken["imported"] == 1 and taken["data"][0]["id"] == digest[:12], taken
    fleet.ask("DELETE", f"/admin/keys/{digest[:12]}", want=204)
    fleet.ask("DELETE", "/admin/users/carol", want=204)
    fleet.becomes("a user's end", lambda: user().status == 404)
    for path in ("/admin/keys", "/admin/users"):
        page = fleet.ask("GET", f"{path}?limit=1").json()
        assert set(page) == {"data", "next_cursor"}, page


def bans_and_limits(fleet):
    ban = fleet.ask("POST", "/admin/bans", {"subject": "user:alice", "reason": "Noise"}, want=201).json()
    fleet.becomes("a ban", lambda: fleet.chat("sk-canary-of-alice") == 403)
    fleet.ask("GET", f"/admin/bans/{ban['id']}")
    assert len(fleet.ask("GET", "/admin/bans").json()["data"]) == 1
    fleet.ask("DELETE", f"/admin/bans/{ban['id']}", want=204)
    fleet.becomes("a ban's end", lambda: fleet.chat("sk-canary-of-alice") == 200)

    fleet.ask("PUT", "/admin/limits/alone", {"per": "user", "limit": "1/day"})
    fleet.becomes("a limit", lambda: fleet.chat("sk-canary-of-alice") == 429)
    fleet.ask("PUT", "/admin/limits/alone", {"per": "user", "limit": "1000/day", "expires_in": "1h"})
    fleet.becomes("a limit that was raised", lambda: fleet.chat("sk-canary-of-alice") == 200)
    shadow = {"per": "user", "limit": "1/day", "shadow": True}
    fleet.ask("PUT", "/admin/limits/alone", shadow)
    assert fleet.ask("GET", "/admin/limits/alone").json()["shadow"] is True
    fleet.ask("DELETE", "/admin/limits/alone", want=204)
    versions = fleet.ask("GET", "/admin/limits/alone/history").json()["data"]
    assert [version["action"] for version in versions] == ["delete", "put", "put", "put"], versions
    back = {"version": versions[3]["version"]}
    fleet.ask("POST", "/admin/limits/alone/rollback", back)
    fleet.becomes("a limit that was put back", lambda: fleet.chat("sk-canary-of-alice") == 429)
    fleet.ask("POST", "/admin/rate-limit/clear?key=rate_limit:user:alice")
    fleet.becomes("a clear", lambda: fleet.chat("sk-canary-of-alice") == 200)
    fleet.becomes("and what is counted since", lambda: fleet.chat("sk-canary-of-alice") == 429)
    fleet.ask("DELETE", "/admin/limits/alone", want=204)
    fleet.becomes("a limit's end", lambda: fleet.chat("sk-canary-of-alice") == 200)
    assert "everybody" in [rule["name"] for rule in fleet.ask("GET", "/admin/limits").json()["data"]]


def the_rest(fleet):
    for explained in (fleet.ask("GET", "/admin/explain?user=alice&model=chat"),
                      fleet.ask("POST", "/admin/explain", {"user": "alice", "model": "chat"})):
        assert explained.json()["allowed"] is True and explained.json()["rules"], explained.text
    drain = "/admin/models/chat/providers/simulated/drain"
    fleet.ask("POST", drain, {"reason": "maintenance"})
    fleet.becomes("a drain", lambda: fleet.chat("sk-canary-of-alice") == 502)
    fleet.ask("DELETE", drain, want=204)
    fleet.becomes("a drain's end", lambda: fleet.chat("sk-canary-of-alice") == 200)
    assert fleet.ask("GET", "/admin/models").json()["data"][0]["name"] == "chat"
    count = len(fleet.gateways)
    fleet.becomes("instances", lambda: len(fleet.ask("GET", "/admin/instances").json()["data"]) == count, SOON)
    note = fleet.ask("GET", "/admin/audit").json()["data"][0]
    assert (note["actor"], note["action"]) == ("admin", "drains.delete"), note
    checked = fleet.ask("POST", "/admin/config/check", "models: []", headers={"content-type": "text/plain"})
    assert checked.json()["ok"] is False and checked.json()["problems"], checked.text
    assert fleet.ask("POST", "/admin/config/reload").json()["status"] == "success"
    fleet.ask("GET", "/admin/openapi.json")
    for method, path in sorted(fleet.operations - fleet.asked):
        # What is only to be looked at, and needs nothing to be named.
        if method == "GET" and "{" not in path:
            fleet.ask(method, path)
    assert not fleet.operations - fleet.asked, f"{fleet.name}: never asked: {fleet.operations - fleet.asked}"


def revocation_under_load(fleet):
    """Eight callers that send as fast as they can: none is let in a second after the key was revoked."""
    made = fleet.ask("POST", "/admin/keys", {"user": "bob"}, want=201).json()
    fleet.becomes("a key", lambda: fleet.chat(made["key"]) == 200)
    stop, let_in, refused, other = threading.Event(), [], [], []

    def call(gateway):
        host, port = gateway.data.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=SOON)
        headers = {"Authorization": f"Bearer {made['key']}"}
        while not stop.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", "/v1/chat/completions", CHAT, headers)
                response = connection.getresponse()
                response.read()
            except ConnectionError:
                # Who is refused before the body has come may find the connection closed.
                connection.close()
                continue
            {200: let_in, 401: refused}.get(response.status, other).append(began)
        connection.close()

    callers = [threading.Thread(target=call, args=(fleet.gateways[n % len(fleet.gateways)],)) for n in range(8)]
    for caller in callers:
        caller.start()
    fleet.becomes("load", lambda: len(let_in) > 200, SOON)
    fleet.ask("POST", f"/admin/keys/{made['id']}/revoke")
    revoked = time.monotonic()
    try:
        fleet.becomes("refusals", lambda: len(refused) > 200, SOON)
        time.sleep(max(0.0, revoked + EVERYWHERE + 0.2 - time.monotonic()))
    finally:
        stop.set()
        for caller in callers:
            caller.join(SOON)
    assert not other, f"{fleet.name}: {len(other)} answers that are neither 200 nor 401"
    late = max(let_in) - revoked
    assert late < EVERYWHERE, f"{fleet.name}: let in {late:.2f} s after the key was revoked"
    print(f"{fleet.name}: {len(let_in)} let in, the last sent {max(late, 0) * 1000:.0f} ms after the revocation")


@contextlib.contextmanager
def redis_server():
    """One of its own; the connections that wait for messages are killed again and again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    stop, killed = threading.Event(), [0]

    def kill():
        with socket.create_connection(("127.0.0.1", port), timeout=SOON) as connection:
            while not stop.wait(0.02):
                connection.sendall(b"CLIENT KILL TYPE pubsub\r\n")
                killed[0] += int(connection.recv(64)[1:].split(b"\r\n")[0])

    killer = threading.Thread(target=kill)
    try:
        began = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() - began < SOON, "redis-server does not start"
                time.sleep(0.01)
        killer.start()
        yield f"redis://127.0.0.1:{port}/0", killed
    finally:
        stop.set()
        if killer.is_alive():
            killer.join(SOON)
        server.kill()
        server.wait()
        shutil.rmtree(folder)


def told(lines):
    """The last lines of a log that are not about single requests."""
    return [line for line in lines if '"message":"request"' not in line][-20:]


def drive(gateways, name):
    fleet = Fleet(gateways, name)
    try:
        for part in (fixed_shapes, keys, bans_and_limits, the_rest, revocation_under_load):
            part(fleet)
    except Exception:
        for gateway in gateways:
            print(f"{name}: {gateway.admin} said last:\n{''.join(told(gateway.lines))}", file=sys.stderr)
        raise
    print(f"{name}: {len(fleet.asked)} operations; the slowest change was in force after {fleet.slowest * 1000:.0f} ms")
    return len(fleet.asked)


def main():
    began = time.monotonic()
    config = (HERE / "tollgate.yml").read_text()
    with Gateway(HERE / "tollgate.yml") as gateway:
        asked = drive([gateway], "memory")
    with redis_server() as (url, killed), tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tollgate.yml"
        path.write_text(f"dependencies: {{ redis: {{ url: '{url}', timeout: 2s }} }}\n{config}")
        with Gateway(path) as one, Gateway(path) as other:
            asked += drive([one, other], "redis, two instances")
        print(f"redis: {killed[0]} subscriptions were killed")
        assert killed[0] > 0
    print(f"admin-api: {asked} operations asked, all as they should be, in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()

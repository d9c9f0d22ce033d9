"""The admin API, asked whatever its own description allows and does not allow, with the key of a viewer.

Nothing that changes something may succeed, nothing may be answered 5xx, every answer must be as it is described, and no
answer may contain a secret. `test_schema.py admin` asks with the key of an admin: then changes may succeed, too.
"""

import json
import os
import pathlib
import sys
import time
import urllib.request

# A proxy of the machine is not for addresses of the machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,127.0.0.2"

import hypothesis
import schemathesis
from schemathesis.checks import content_type_conformance, not_a_server_error, response_schema_conformance
from schemathesis.generation import GenerationMode

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))
from gateway import Gateway

# The same cases in every run: a failure is found again.
SEED = 20_270_101
EXAMPLES = int(os.environ.get("TOLLGATE_SCHEMA_EXAMPLES", "12"))
SECONDS_MAX = 60
KEYS = {"viewer": "canary-of-board", "operator": "canary-of-olga", "admin": "canary-of-root"}
ROLES = list(KEYS)
# These never end.
STREAMS = {"/admin/events"}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


def send(url, body=None, **headers):
    """The body of an answer that must be a good one."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def prepare(gateway):
    """Something to be seen; gives back what must not be, and what is there by the beginning of its path."""
    admin = lambda path, body: json.loads(
        send(f"http://{gateway.admin}{path}", body, **{"X-Admin-Key": KEYS["admin"]})
    )
    made = admin("/admin/keys", {"user": "alice", "name": "laptop", "limits": ["9/day"]})
    rotated = admin(f"/admin/keys/{made['id']}/rotate", {"overlap": "1h"})
    imported = "5ec2e7" * 10 + "5ec2"
    admin("/admin/keys/import", {"keys": [{"hash": f"sha256:{imported}", "user": "bob"}]})
    admin("/admin/users", {"name": "carol", "team": "red"})
    ban = admin("/admin/bans", {"subject": "ip:192.0.2.1", "reason": "Noise"})
    question = {"model": "chat", "messages": [{"role": "user", "content": "the canary in this prompt"}]}
    send(f"http://{gateway.data}/v1/chat/completions", question, Authorization=f"Bearer {rotated['key']}")
    # Ids are told: the first characters of keys, and of hashes of imported ones.
    secrets = ["canary", made["key"][12:], rotated["key"][12:], imported[12:], "ca9a47" * 10]
    there = {
        "/admin/keys/": {"id": made["id"]},
        "/admin/bans/": {"id": ban["id"]},
        "/admin/users/": {"name": "carol"},
        "/admin/limits/": {"name": "everybody"},
        "/admin/models/": {"model": "chat", "provider": "simulated"},
    }
    return secrets, there


def main():
    role = sys.argv[1] if len(sys.argv) > 1 else "viewer"
    began, asked, found = time.monotonic(), 0, {}
    with Gateway(HERE / "tollgate.yml") as gateway:
        secrets, there = prepare(gateway)
        headers = {"X-Admin-Key": KEYS[role]}
        schema = schemathesis.openapi.from_url(f"http://{gateway.admin}/admin/openapi.json", headers=headers)

        def ask(operation, mode, more):
            needed = operation.definition.raw["x-role"]
            privileged = ROLES.index(needed) > ROLES.index(role)

            @hypothesis.seed(SEED)
            @hypothesis.settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode, **more))
            def cases(case):
                nonlocal asked
                asked += 1
                sent = dict(case.headers or {}) | headers
                answer = case.call(base_url=f"http://{gateway.admin}", headers=sent, timeout=10)
                what = f"{case.as_curl_command(headers)}\n  {answer.status_code}: {answer.text[:500]}"
                assert not (privileged and answer.status_code < 300), f"a {role} may not do this: {what}"
                told = [secret for secret in secrets if secret in answer.text + str(answer.headers)]
                # What was sent may be repeated: it is no secret of ours.
                told = [secret for secret in told if secret not in (case.as_curl_command({}))]
                assert not told, f"a secret is told: {what}"
                case.validate_response(answer, checks=CHECKS)

            cases()

        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path in STREAMS:
                continue
            known = [names for path, names in there.items() if operation.path.startswith(path)]
            # Made up, of what there is, and of what there is with a body or a query that is wrong.
            ways = [(mode, {}) for mode in GenerationMode]
            ways += [(mode, {"path_parameters": names}) for mode in GenerationMode for names in known]
            if operation.path == "/admin/explain" and operation.method == "get":
                ways.append((GenerationMode.POSITIVE, {"query": {"user": "alice", "model": "chat"}}))
            for mode, more in ways:
                label = f"{operation.label} ({mode.value}) {more}"
                try:
                    ask(operation, mode, more)
                except hypothesis.errors.Unsatisfiable:
                    # Nothing about it can be wrong.
                    pass
                except Exception as error:  # every fault is told, not the first one only
                    found[label] = error
        logged = [line for line in gateway.lines if any(secret in line for secret in secrets)]
    took = time.monotonic() - began
    for label, error in found.items():
        print(f"FAILED {label}\n  {type(error).__name__}: {error}\n")
    for line in logged:
        print(f"FAILED a secret in the log: {line}")
    if took > SECONDS_MAX:
        print(f"note: {took:.0f} s; {SECONDS_MAX} were meant")
    print(f"admin-schema: {asked} requests as {role}, {len(found) + len(logged)} faults, {took:.1f} s")
    sys.exit(1 if found or logged else 0)


if __name__ == "__main__":
    main()

"""What is measured: the subjects, the loads that they carry, and what has to be installed for them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

KEY = "sk-bench-4f1d2c7a90be"
# A key that gateway.yml lets in once a day.
SPENT_KEY = "sk-spent-83e0b6d15f27"
UNKNOWN_KEY = "sk-unknown"


@dataclass(frozen=True)
class Subject:
    """Something between the caller and the provider."""

    name: str                           # on the command line and in JSON
    title: str                          # in Markdown
    program: str | None = None          # "nginx" or "tollgate"; None: the provider itself
    conf: str | None = None             # its configuration, in this directory
    redis: bool = False                 # with a redis-server of its own, so that the CPU of each can be told apart
    refuses: tuple[str, ...] = ()       # names of the refused loads that it knows to refuse


SUBJECTS = [
    Subject("direct", "direct"),
    Subject("nginx", "nginx", "nginx", "nginx-plain.conf"),
    Subject("nginx-lua-redis", "nginx + Lua + Redis", "nginx", "nginx-lua-redis.conf", redis=True, refuses=("unknown",)),
    Subject("tollgate", "tollgate", "tollgate", "gateway.yml", refuses=("unknown", "denied")),
    Subject("tollgate-redis", "tollgate, Redis", "tollgate", "gateway-redis.yml", redis=True,
            refuses=("unknown", "denied")),
]

# The ports that a caller uses, by program: for JSON and for streams. nginx tells its providers apart by the port.
PORTS = {
    None: ("answers_port", "streams_port"),
    "nginx": ("listen_port", "listen_streams_port"),
    "tollgate": ("listen_port", "listen_port"),
}


@dataclass(frozen=True)
class Load:
    """Many requests at once, over and over."""

    name: str
    title: str
    model: str
    connections: int
    streamed: bool = False
    key: str = KEY
    refused: bool = False               # carried only by the subjects that refuse it
    longer: int = 0                     # seconds on top of what was asked for


LOADS = [
    Load("json", "JSON answers", "chat", 32),
    Load("stream", "streams, all at once", "burst", 32, streamed=True),
    # Streams that take 0.3 s need longer to be counted fairly.
    Load("paced", "streams, 10 ms per event", "paced", 96, streamed=True, longer=1),
    Load("unknown", "unknown key refused (401)", "chat", 32, key=UNKNOWN_KEY, refused=True, longer=-1),
    Load("denied", "over the limit refused (429)", "chat", 32, key=SPENT_KEY, refused=True, longer=-1),
]
EVENTS_PER_STREAM = 32


def missing(subjects):
    """What these subjects need and is not installed: what was looked for, and the Debian package that has it."""
    needs = [("nginx", "nginx"), ("wrk", "wrk")]
    if any(subject.redis for subject in subjects):
        needs.append(("redis-server", "redis-server"))
    if any(subject.conf == "nginx-lua-redis.conf" for subject in subjects):
        needs += [
            ("/usr/lib/nginx/modules/ngx_http_lua_module.so", "libnginx-mod-http-lua"),
            ("/usr/lib/nginx/modules/ndk_http_module.so", "libnginx-mod-http-ndk"),
            ("/usr/share/lua/5.1/nginx/redis.lua", "lua-nginx-redis"),
        ]
    return [(what, package) for what, package in needs if not (shutil.which(what) or Path(what).exists())]

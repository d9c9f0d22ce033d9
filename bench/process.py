"""Processes under measurement: started, watched through /proc, ended. Never any process but those started here."""

import os
import re
import socket
import subprocess
import time
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def free_ports(count):
    """Ports of the loopback interface that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def fill(template, into, values):
    """Writes a configuration with each @name@ replaced; a name without a value is an error."""
    text = re.sub(r"@(\w+)@", lambda name: str(values[name[1]]), Path(template).read_text())
    Path(into).write_text(text)
    return str(into)


class Process:
    """A running server with the workers it forked. What it logs is thrown away: nobody waits for a disk here."""

    def __init__(self, command, directory, env=None):
        self.command = command
        self.env = {"PATH": os.environ.get("PATH", ""), **(env or {})}
        self.child = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.env,
        )

    def running(self):
        """Whether it has not ended."""
        return self.child.poll() is None

    def pids(self):
        """Itself and its descendants."""
        children = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (stat := stat_fields(entry.name)):
                children.setdefault(int(stat[1]), []).append(int(entry.name))
        found, open_ = [], [self.child.pid]
        while open_:
            found.append(pid := open_.pop())
            open_.extend(children.get(pid, []))
        return found

    def cpu_seconds(self):
        """User and system time of the tree so far, children that ended included."""
        ticks = 0
        for pid in self.pids():
            # proc(5): utime, stime, cutime, cstime are fields 14 to 17; the list starts with field 3.
            stat = stat_fields(pid)
            ticks += sum(int(field) for field in stat[11:15]) if stat else 0
        return ticks / TICKS_PER_SECOND

    def resident_mib(self):
        """Resident memory of the tree; pages that processes share are counted for each."""
        kib = 0
        for pid in self.pids():
            status = Path(f"/proc/{pid}/status").read_text()
            kib += int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)[1])
        return kib / 1024

    def stop(self):
        """Ends it: asked first, then made to."""
        if self.child.poll() is not None:
            return
        self.child.terminate()
        try:
            self.child.wait(0.3)
        except subprocess.TimeoutExpired:
            # A gateway that drains takes the second signal as an order.
            self.child.terminate()
            try:
                self.child.wait(2)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Redis(Process):
    """A Redis that keeps nothing on disk, ready to be asked."""

    def __init__(self, port, directory):
        self.port = port
        super().__init__(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
                         directory)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.scripts_run()
                return
            except OSError:
                if not self.running() or time.monotonic() > deadline:
                    self.stop()
                    raise
                time.sleep(0.01)

    def scripts_run(self):
        """How many scripts and functions it has run so far."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection, connection.makefile("rb") as answer:
            connection.sendall(b"INFO commandstats\r\n")
            length = answer.readline()
            if not length.startswith(b"$"):
                raise OSError(f"Redis answered {length!r}")
            statistics = answer.read(int(length[1:])).decode()
        calls = re.findall(r"^cmdstat_(?:eval|evalsha|fcall)(?:_ro)?:calls=(\d+)", statistics, re.MULTILINE)
        return sum(int(count) for count in calls)


def stat_fields(pid):
    """Fields of /proc/<pid>/stat from the third on; None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None

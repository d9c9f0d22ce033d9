"""The providers, the proxies and their Redis servers: started on free ports, loaded, ended."""

import subprocess
import sys
import time
from pathlib import Path

import load
from process import Process, Redis, fill, free_ports
from subjects import KEY, PORTS, SPENT_KEY, Subject

HERE = Path(__file__).resolve().parent
ANSWERS = Subject("answers", "provider of JSON", "nginx", "nginx-answers.conf")
STREAMS = Subject("streams", "provider of streams", "tollgate", "streams.yml")
PROVIDERS_PORTS = ["answers_port", "streams_port", "streams_admin_port"]
OWN_PORTS = ["listen_port", "listen_streams_port", "admin_port", "redis_port"]


class Bench:
    """Everything that runs; leaving it ends all of it."""

    def __init__(self, subjects, binary, run):
        self.subjects, self.binary, self.run = subjects, binary, run
        ports = iter(free_ports(len(PROVIDERS_PORTS) + len(OWN_PORTS) * len(subjects)))
        shared = {"run": run, "bench_key": KEY, "spent_key": SPENT_KEY} | {name: next(ports) for name in PROVIDERS_PORTS}
        # What the configurations name: `@listen_port@` with nginx, `${LISTEN_PORT}` with Tollgate.
        self.values = {ANSWERS: shared, STREAMS: shared}
        self.values |= {subject: shared | {name: next(ports) for name in OWN_PORTS} for subject in subjects}
        self.processes = []
        self.proxies = {}
        self.redis = {}

    def __enter__(self):
        try:
            for provider in (ANSWERS, STREAMS):
                self._launch(provider)
            for subject in self.subjects:
                if subject.redis:
                    self.redis[subject] = Redis(self.values[subject]["redis_port"], self.run)
                    self.processes.append(self.redis[subject])
            direct = self.subjects[0]
            for model in ("chat", "burst"):
                self._until_answered(direct, model)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.stop()

    def start(self, subject):
        """Starts a proxy; milliseconds to its first answer."""
        started = time.perf_counter()
        self.proxies[subject] = self._launch(subject)
        self._until_answered(subject, "chat")
        return (time.perf_counter() - started) * 1e3

    def stop(self, subject):
        """Stops a proxy. Its Redis stays."""
        process = self.proxies.pop(subject)
        process.stop()
        self.processes.remove(process)

    def caller(self, subject, model):
        """A connection that asks a subject for this model, one request at a time."""
        return load.Caller(self._port(subject, model), load.body(model, model != "chat"))

    def load(self, subject, what, seconds):
        """
        Loads a subject. wrk's counts, and for each 10,000 requests the CPU seconds of the proxy and of its Redis; the
        scripts that its Redis ran for each request.
        """
        watched = {"": self.proxies.get(subject), "redis_": self.redis.get(subject)}
        watched = {prefix: process for prefix, process in watched.items() if process}
        before = {prefix: process.cpu_seconds() for prefix, process in watched.items()}
        scripts = self.redis[subject].scripts_run() if subject.redis else 0
        counted = load.wrk(self._port(subject, what.model), load.body(what.model, what.streamed), what.connections,
                           max(1, seconds + what.longer), what.key)
        requests = counted["requests"]
        for prefix, process in watched.items():
            counted[f"{prefix}cpu_s_per_10k"] = (process.cpu_seconds() - before[prefix]) / requests * 1e4
        if subject.redis:
            counted["redis_scripts_per_request"] = (self.redis[subject].scripts_run() - scripts) / requests
        # One request a day passes where the others are over the limit.
        expected = (requests - 1, requests) if what.refused else (0,)
        if counted["refused"] not in expected:
            raise RuntimeError(f"{subject.title}, {what.title}: unexpected statuses: {counted}")
        return counted

    def _port(self, subject, model):
        for_json, for_streams = PORTS[subject.program]
        return self.values[subject][for_json if model == "chat" else for_streams]

    def _launch(self, subject):
        values = self.values[subject]
        if subject.program == "nginx":
            filled = fill(HERE / subject.conf, self.run / subject.conf, values)
            process = Process(["nginx", "-p", str(self.run), "-e", "stderr", "-c", filled], self.run)
        else:
            environment = {name.upper(): str(value) for name, value in values.items()}
            process = Process([self.binary, "serve", "-c", str(HERE / subject.conf)], self.run, environment)
        self.processes.append(process)
        return process

    def _until_answered(self, subject, model, patience=10):
        deadline = time.monotonic() + patience
        while True:
            try:
                caller = self.caller(subject, model)
                caller.first_byte()
                return caller.close()
            except OSError as error:
                for process in self.processes:
                    if not process.running():
                        self._explain(process)
                if time.monotonic() > deadline:
                    sys.exit(f"{subject.title} does not answer for {model}: {error}")
                time.sleep(0.0005)

    def _explain(self, process):
        """Shows why something ended at once: nginx and Tollgate can check their configuration."""
        program, *options = process.command
        checks = {"nginx": [program, *options, "-t"], self.binary: [program, "check", "--offline", options[-1]]}
        if program in checks:
            subprocess.run(checks[program], env=process.env, check=False)
        sys.exit(f"ended at once: {' '.join(process.command)}")

"""What came out: medians over the rounds, ratios within a round, and both as Markdown."""

import statistics
from dataclasses import dataclass

from subjects import EVENTS_PER_STREAM, LOADS


@dataclass(frozen=True)
class Ratio:
    """A figure of one subject under one load to that of another, within the same round."""

    title: str
    over: tuple[str, str]               # load, subject
    under: tuple[str, str]
    wanted: str = ""
    figure: str = "cpu_s_per_10k"


RATIOS = [
    Ratio("JSON answers: tollgate / nginx", ("json", "tollgate"), ("json", "nginx"), "≤ 1.3"),
    Ratio("streams, all at once: tollgate / nginx", ("stream", "tollgate"), ("stream", "nginx"), "≤ 1.5"),
    Ratio("streams, 10 ms per event: tollgate / nginx", ("paced", "tollgate"), ("paced", "nginx"), "≤ 1.5"),
    Ratio("JSON answers: tollgate, Redis / nginx + Lua + Redis",
          ("json", "tollgate-redis"), ("json", "nginx-lua-redis"), "≤ 1"),
    Ratio("streams, all at once: tollgate, Redis / nginx + Lua + Redis",
          ("stream", "tollgate-redis"), ("stream", "nginx-lua-redis"), "≤ 1"),
    Ratio("streams, 10 ms per event: tollgate, Redis / nginx", ("paced", "tollgate-redis"), ("paced", "nginx"), "≤ 1.5"),
    Ratio("JSON answers, CPU of Redis: tollgate's / nginx + Lua's",
          ("json", "tollgate-redis"), ("json", "nginx-lua-redis"), figure="redis_cpu_s_per_10k"),
    Ratio("streams, CPU of Redis: tollgate's / nginx + Lua's",
          ("stream", "tollgate-redis"), ("stream", "nginx-lua-redis"), figure="redis_cpu_s_per_10k"),
    Ratio("unknown key refused by tollgate / proxied by nginx", ("unknown", "tollgate"), ("json", "nginx"), "≤ 0.6"),
    Ratio("unknown key refused by tollgate, Redis / proxied by nginx",
          ("unknown", "tollgate-redis"), ("json", "nginx"), "≤ 0.6"),
    Ratio("429 by tollgate / proxied by nginx", ("denied", "tollgate"), ("json", "nginx"), "≤ 0.6"),
    Ratio("429 by tollgate, Redis / proxied by nginx", ("denied", "tollgate-redis"), ("json", "nginx"), "≤ 0.6"),
]


def summary(rounds):
    """Medians over the rounds, by load and subject."""
    loads = {}
    for load in LOADS:
        loads[load.name] = {subject: figures([each[load.name][subject] for each in rounds], load)
                            for subject in rounds[0][load.name]}
    return loads


def figures(counts, load):
    """The medians of one subject under one load."""
    found = {"requests_per_s": statistics.median(each["requests"] / each["seconds"] for each in counts)}
    for name in ("cpu_s_per_10k", "redis_cpu_s_per_10k", "redis_scripts_per_request"):
        if name in counts[0]:
            found[name] = statistics.median(each[name] for each in counts)
    if load.streamed and "cpu_s_per_10k" in found:
        found["cpu_us_per_event"] = found["cpu_s_per_10k"] * 100 / EVENTS_PER_STREAM
    return {name: round(value, 4) for name, value in found.items()}


def ratios(rounds):
    """The median over the rounds of each ratio whose subjects took part."""
    found = []
    for ratio in RATIOS:
        pairs = [[each[load].get(subject, {}).get(ratio.figure) for load, subject in (ratio.over, ratio.under)]
                 for each in rounds]
        values = [over / under for over, under in pairs if over is not None and under]
        if values:
            found.append({"title": ratio.title, "ratio": round(statistics.median(values), 3), "wanted": ratio.wanted})
    return found


def added(times):
    """Median microseconds to the first byte of a body, and what a proxy adds to the direct way."""
    medians = {subject: statistics.median(each) * 1e6 for subject, each in times.items()}
    return {
        subject: {"p50_us": round(value, 1), "added_us": round(value - medians["direct"], 1), "requests": len(times[subject])}
        for subject, value in medians.items()
    }


def markdown(result, proxies):
    """Two tables: the figures of each proxy, and the ratios."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{versions}; {result['cores']} cores, {result['rounds']} rounds, {result['when']}",
        "",
        row("", *(proxy.title for proxy in proxies), "wanted"),
        "|---" * (len(proxies) + 2) + "|",
    ]
    for title, digits, values, wanted in table(result):
        cells = [values.get(proxy.name) for proxy in proxies]
        lines.append(row(title, *("–" if cell is None else f"{cell:,.{digits}f}" for cell in cells), wanted))
    lines += ["", row("CPU per request, ratio within a round", "median", "wanted"), "|---|---|---|"]
    lines += [row(each["title"], f"{each['ratio']:.2f}", each["wanted"]) for each in result["ratios"]]
    loads = result["load"]
    direct = ", ".join(f"{load.title} {loads[load.name]['direct']['requests_per_s']:,.0f}/s"
                       for load in LOADS if not load.refused)
    return "\n".join([*lines, "", f"Direct, without a proxy: {direct}."]) + "\n"


def table(result):
    """Rows of the first table: title, decimals, value by subject, what is wanted of Tollgate."""
    def of_load(load, figure):
        return {subject: each.get(figure) for subject, each in result["load"][load].items()}

    def of(section, figure):
        return {subject: each[figure] for subject, each in section.items()}

    for load in LOADS:
        yield f"CPU s per 10,000: {load.title}", 3, of_load(load.name, "cpu_s_per_10k"), ""
    # Not of paced streams: so few of them begin in a second that an idle Redis would be most of it.
    for load in LOADS[:2]:
        yield f"CPU s of Redis per 10,000: {load.title}", 3, of_load(load.name, "redis_cpu_s_per_10k"), ""
    yield "scripts in Redis per JSON answer", 2, of_load("json", "redis_scripts_per_request"), "≤ 2: reserve, settle"
    yield "scripts in Redis per 429", 2, of_load("denied", "redis_scripts_per_request"), "0"
    single, memory = result["single"], result["memory"]
    beside = "Redis: ≤ nginx + Lua + Redis"
    yield "added p50, one caller, JSON, µs", 0, of(single["chat"], "added_us"), beside
    yield "added p50, one caller, first byte of a stream, µs", 0, of(single["burst"], "added_us"), beside
    yield "start to first answer, ms", 0, result["start_ms"], "≤ 100 ms"
    yield "resident, idle, MiB", 1, of(memory, "idle_mib"), "≤ 25 MiB"
    yield "resident, loaded, MiB", 1, of(memory, "loaded_mib"), "≤ 60 MiB"
    yield "after so many requests", 0, of(memory, "requests"), ""


def row(*cells):
    return "| " + " | ".join(cells) + " |"

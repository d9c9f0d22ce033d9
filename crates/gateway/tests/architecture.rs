//! The architecture as invariants of absence: what must not be where. ARCHITECTURE.md says why.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the gateway and the floor each stands on. A module may name those of its own floor and below.
const FLOORS: [(&str, u8); 36] = [
    ("cli", 5),
    ("edge", 5),
    ("admin", 5),
    ("pipeline", 4),
    ("relay", 4),
    ("ledger", 4),
    ("refusals", 4),
    ("reload", 4),
    ("fleet", 4),
    ("live", 4),
    ("usage", 4),
    ("snapshot", 3),
    ("control", 3),
    ("identity", 3),
    ("admission", 3),
    ("limits", 3),
    ("rates", 3),
    ("route", 3),
    ("upstream", 3),
    ("simulated", 3),
    ("config", 2),
    ("metrics", 2),
    ("log", 2),
    ("recent", 2),
    ("journal", 2),
    ("error", 2),
    ("headers", 2),
    ("router", 2),
    ("estimate", 2),
    ("call", 1),
    ("dialect", 1),
    ("fields", 1),
    ("http1", 1),
    ("ids", 1),
    ("json", 1),
    ("request", 1),
];

/// The files through which each outside crate comes in.
const DOORS: [(&str, &[&str]); 19] = [
    ("axum", &["admin.rs", "admin/", "edge.rs"]),
    ("clap", &["cli.rs", "cli/"]),
    ("granit_parser", &["config/parse.rs"]),
    ("httparse", &["upstream/head.rs"]),
    ("httpdate", &["edge/http1/sending.rs"]),
    ("hyper_rustls", &["upstream/connect.rs"]),
    ("hyper_util::client", &["upstream/connect.rs", "cli/"]),
    ("hyper::server", &["edge.rs"]),
    ("getrandom", &["control/mint.rs"]),
    ("jiff", &["config/", "control/time.rs", "log.rs"]),
    ("notify", &["reload.rs"]),
    ("prometheus_client", &["metrics.rs"]),
    ("percent_encoding", &["config/redis_url.rs", "cli/client.rs"]),
    ("redb", &["control/file.rs"]),
    ("redis::aio", &["control/"]),
    ("rustls", &["upstream/connect.rs", "config/pem.rs"]),
    ("tiktoken", &["estimate/exact.rs"]),
    ("tracing_subscriber", &["log.rs", "cli/serve.rs"]),
    ("arc_swap", &["lib.rs"]),
];

struct Source {
    /// Relative to `src/`.
    path: String,
    /// Without the tests at its end and without comments.
    code: String,
}

fn sources(root: &str) -> Vec<Source> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let mut files = Vec::new();
    walk(&root, &mut files);
    let product = files.into_iter().filter(|path| {
        let name = path.strip_prefix(&root).unwrap();
        !name.components().any(|part| part.as_os_str().to_string_lossy().starts_with("tests"))
    });
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code: Vec<&str> = product.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        Source {
            path: path.strip_prefix(&root).unwrap().to_string_lossy().into_owned(),
            code: code.join("\n"),
        }
    };
    let sources: Vec<Source> = product.map(read).collect();
    assert!(sources.len() > 5, "{} has no sources", root.display());
    sources
}

/// Whether `word` stands in `code` as a word of its own.
fn names(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back().is_none_or(|c| !part(c) && c != '.');
        let after = code[at + word.len()..].starts_with("::");
        before && after
    })
}

fn floor(module: &str) -> Option<u8> {
    if module == "sse" {
        return Some(1);
    }
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

fn module_of(path: &str) -> &str {
    path.split(['/', '.']).next().unwrap()
}

#[test]
fn values_go_down_or_sideways_never_up() {
    for source in sources("src") {
        let Some(own) = floor(module_of(&source.path)) else {
            assert!(
                matches!(source.path.as_str(), "lib.rs" | "main.rs"),
                "{} stands on no floor",
                source.path
            );
            continue;
        };
        for used in source.code.split("crate::").skip(1) {
            let grouped = used.strip_prefix('{').map(|group| group.split('}').next().unwrap());
            let modules = match grouped {
                Some(group) => group.split(',').map(|item| item.trim().split("::").next().unwrap()).collect(),
                None => vec![used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap()],
            };
            for module in modules {
                if let Some(theirs) = floor(module) {
                    assert!(theirs <= own, "{} (floor {own}) names {module} (floor {theirs})", source.path);
                }
            }
        }
    }
}

#[test]
fn the_pure_floor_does_no_input_or_output() {
    for source in sources("src").iter().filter(|source| floor(module_of(&source.path)) == Some(1)) {
        for outside in
            ["tokio", "hyper", "hyper_util", "axum", "std::net", "std::fs", "std::time", "std::env"]
        {
            assert!(!names(&source.code, outside), "{} names {outside}", source.path);
        }
    }
}

#[test]
fn the_pipeline_names_no_framework_and_no_store() {
    for source in sources("src").iter().filter(|source| source.path == "pipeline.rs") {
        for outside in ["axum", "hyper", "hyper_util", "redis"] {
            assert!(!names(&source.code, outside), "{} names {outside}", source.path);
        }
    }
}

#[test]
fn each_outside_crate_has_its_doors() {
    let sources = sources("src");
    for (outside, doors) in DOORS {
        let through = |source: &&Source| names(&source.code, outside);
        for source in sources.iter().filter(through) {
            let allowed = doors.iter().any(|door| source.path == *door || source.path.starts_with(door));
            assert!(allowed, "{} names {outside}; its doors are {doors:?}", source.path);
        }
        assert!(sources.iter().any(|source| through(&source)), "nobody names {outside}: close its door");
    }
}

#[test]
fn nothing_is_ambient() {
    for source in sources("src").iter().chain(&sources("../limiter/src")) {
        for word in ["static mut", "thread_local!", "LazyLock", "OnceLock", "lazy_static"] {
            assert!(!source.code.contains(word), "{} has {word}", source.path);
        }
        let changes = |line: &str| {
            let shared = ["Mutex", "RwLock", "Atomic", "Cell", "Lock"];
            line.contains("static ") && shared.iter().any(|kind| line.contains(kind))
        };
        assert!(!source.code.lines().any(changes), "{} has a static that changes", source.path);
        let reads_environment = source.code.contains("env::var");
        assert!(!reads_environment || source.path == "reload.rs", "{} reads the environment", source.path);
    }
}

#[test]
fn metrics_are_written_and_never_read() {
    for source in sources("src") {
        let reads = source.code.contains(".encode()");
        assert!(
            !reads || matches!(source.path.as_str(), "admin.rs" | "metrics.rs"),
            "{} reads metrics",
            source.path
        );
    }
}

/// What of the limiter may name what. Everything else of it is values and locks.
const LIMITER_DOORS: [(&str, &[&str]); 11] = [
    ("http", &["tower"]),
    ("http_body", &["tower"]),
    ("tower_layer", &["tower"]),
    ("tower_service", &["tower"]),
    ("redb", &["memory/persist"]),
    ("std::fs", &["memory/persist"]),
    // Also the name of our own module, which the front door and the layer's storage open.
    ("redis", &["redis", "resilient", "lib.rs", "tower/storage.rs"]),
    ("tokio", &["redis", "resilient"]),
    ("tokio_rustls", &["redis/tls", "redis/dial"]),
    ("std::net", &["tower", "redis"]),
    ("std::env", &[]),
];

#[test]
fn the_limiter_knows_nothing_of_its_users() {
    for source in sources("../limiter/src") {
        for outside in ["hyper", "axum", "serde_json", "serde"] {
            assert!(!names(&source.code, outside), "limiter's {} names {outside}", source.path);
        }
        for (outside, doors) in LIMITER_DOORS {
            let allowed = doors.iter().any(|door| source.path.starts_with(door));
            assert!(allowed || !names(&source.code, outside), "limiter's {} names {outside}", source.path);
        }
    }
}

#[test]
fn the_specification_is_pure() {
    let sources = sources("../limiter/src");
    let specification = sources.iter().filter(|source| module_of(&source.path) == "spec");
    let mut seen = 0;
    for source in specification {
        seen += 1;
        for used in source.code.split("use crate::").skip(1) {
            let module = used.split([':', ';', ' ']).next().unwrap();
            assert!(matches!(module, "quota" | "clock" | "spec"), "{} names {module}", source.path);
        }
        for word in ["f32", "f64", "async ", "SystemTime", "Instant", "std::time"] {
            assert!(!source.code.contains(word), "{} has {word}", source.path);
        }
    }
    assert!(seen > 0);
}

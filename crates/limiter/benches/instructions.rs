//! Instructions per decision, counted by valgrind, which no other work on the machine disturbs:
//! `cargo bench -p tollgate-limiter --bench instructions`. Fails past the bounds.

mod loads;

use std::hint::black_box;
use std::process::{Command, ExitCode};

use loads::Load;

/// The difference between a long and a short run is decisions only, all of known callers.
const SHORT: usize = 20_000;
const LONG: usize = 60_000;
/// The same work on both sides: one limit of a known caller, and nothing to settle.
const RATIO_MAX: f64 = 2.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, what, turns] = &arguments[..] {
        work(what, turns.parse().expect("a number"));
        return ExitCode::SUCCESS;
    }
    let Some(governor) = per_decision("governor") else {
        eprintln!("valgrind is needed: apt-get install valgrind");
        return ExitCode::FAILURE;
    };
    println!("instructions per decision");
    println!("governor, check_key   {governor:6.0}");
    let mut ratio = 0.0;
    for (what, name) in [
        ("take", "take, 1 limit"),
        ("1", "reserve, 1 limit"),
        ("2", "reserve, 2 limits"),
        ("4", "reserve, 4 limits"),
    ] {
        let here = per_decision(what).expect("valgrind was there before");
        println!("{name:21} {here:6.0}   {:.2} x governor", here / governor);
        ratio = if what == "take" { here / governor } else { ratio };
    }
    if ratio > RATIO_MAX {
        eprintln!("taking one limit costs more than {RATIO_MAX} times governor's check");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn work(what: &str, turns: usize) {
    let load = Load::new(None);
    for turn in 0..turns {
        black_box(match what {
            "governor" => load.governor(turn),
            "take" => load.tollgate_take(turn),
            limits => load.tollgate_reserve(turn, limits.parse().expect("a number of limits")),
        });
    }
}

fn per_decision(what: &str) -> Option<f64> {
    let long = instructions(what, LONG)?;
    let short = instructions(what, SHORT)?;
    Some((long - short) as f64 / (LONG - SHORT) as f64)
}

/// This program once more, under callgrind, which counts only inside of decisions.
fn instructions(what: &str, turns: usize) -> Option<u64> {
    let out = std::env::temp_dir().join(format!("tollgate-callgrind-{}", std::process::id()));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*Load::governor*", "--toggle-collect=*Load::tollgate*"])
        .args([&format!("--callgrind-out-file={}", out.display())])
        .arg(std::env::current_exe().ok()?)
        .args([what, &turns.to_string()])
        .output()
        .ok()?;
    let _ = std::fs::remove_file(out);
    let report = String::from_utf8_lossy(&output.stderr);
    let collected = report.lines().find_map(|line| line.split_once("Collected : "))?.1;
    collected.trim().parse().ok()
}

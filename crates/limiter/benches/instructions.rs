//! Instructions per decision, counted by valgrind, which no other work on the machine disturbs:
//! `cargo bench -p tollgate-limiter --bench instructions`. Fails past the bounds.

mod loads;

use std::hint::black_box;
use std::process::{Command, ExitCode};

use loads::Load;

/// The difference between a long and a short run is decisions only, all of known callers.
const SHORT: usize = 20_000;
const LONG: usize = 60_000;
/// Of four limits of a known caller, with nothing to settle, to one of governor's.
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
    let mut four = f64::INFINITY;
    for what in ["take", "reserve", "settle"] {
        for limits in ["1", "2", "4"] {
            let here = per_decision(&[what, limits].join("-")).expect("valgrind was there before");
            println!("{what:7}, {limits} limits     {here:6.0}   {:.2} x governor", here / governor);
            four = if (what, limits) == ("take", "4") { here / governor } else { four };
        }
    }
    if four > RATIO_MAX {
        eprintln!("taking four limits costs more than {RATIO_MAX} times governor's check of one");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// `governor`, or what and how many limits: `take-4`.
fn work(what: &str, turns: usize) {
    let load = Load::new(None);
    let (what, limits) = what.split_once('-').unwrap_or((what, "0"));
    let limits = limits.parse().expect("a number of limits");
    for turn in 0..turns {
        match what {
            "governor" => black_box(load.governor(turn)),
            "take" => black_box(load.tollgate_take(turn, limits)),
            "reserve" => black_box(load.tollgate_reserve(turn, limits)),
            _ => black_box(load.tollgate_settle(turn, limits) > 0),
        };
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

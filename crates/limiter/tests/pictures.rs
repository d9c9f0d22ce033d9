//! The pictures of `docs/limits.md`: what each algorithm admits of the same traffic, drawn from what the engine does.
//! A picture that differs from the committed one fails; `UPDATE_PICTURES=1 cargo test --test pictures` draws them anew.

mod support;

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::Path;

use support::{START, charge, limit};
use tollgate_limiter::{Algorithm, Decision, ManualClock, MemoryStore, Millis, Reservation};

/// Three minutes, drawn in steps of a second.
const SECONDS: u64 = 180;
const WIDTH: u64 = 780;
const LEFT: u64 = 46;
/// Where the bars stand and where the line below them does.
const BARS: (u64, u64) = (132, 10);
const LINE: (u64, u64) = (270, 120);
const SCALE: u64 = 4;

/// Requests in this second: one every other, two bursts around the end of a minute, and a long one later.
fn asked(second: u64) -> u64 {
    match second {
        50..58 | 62..70 => 10,
        120..150 => 4,
        _ => second % 2,
    }
}

struct Drawing {
    file: &'static str,
    title: &'static str,
    quota: &'static str,
    algorithm: Algorithm,
    /// What the line shows, and where its dashed lines are.
    line: &'static str,
    marks: &'static [u64],
}

const DRAWINGS: [Drawing; 5] = [
    Drawing {
        file: "fixed_window",
        title: "fixed_window, 60/minute",
        quota: "60/minute",
        algorithm: Algorithm::FixedWindow,
        line: "admitted in the last 60 s",
        marks: &[60, 120],
    },
    Drawing {
        file: "sliding_window",
        title: "sliding_window, 60/minute",
        quota: "60/minute",
        algorithm: Algorithm::SlidingWindow,
        line: "admitted in the last 60 s",
        marks: &[60, 120],
    },
    Drawing {
        file: "moving_window",
        title: "moving_window, 60/minute",
        quota: "60/minute",
        algorithm: Algorithm::MovingWindow,
        line: "admitted in the last 60 s",
        marks: &[60, 120],
    },
    Drawing {
        file: "token_bucket",
        title: "token_bucket, 60/minute burst 20",
        quota: "60/minute burst 20",
        algorithm: Algorithm::TokenBucket,
        line: "admitted in the last 60 s",
        marks: &[60, 80],
    },
    Drawing {
        file: "concurrency",
        title: "12 concurrent, each request takes 3 s",
        quota: "12 concurrent",
        algorithm: Algorithm::Concurrency,
        line: "in flight",
        marks: &[12],
    },
];

/// Per second: asked, admitted, and what the line shows at its end.
fn run(drawing: &Drawing) -> Vec<(u64, u64, u64)> {
    let limit = match drawing.algorithm {
        Algorithm::Concurrency => limit("r", drawing.quota, Algorithm::FixedWindow),
        algorithm => limit("r", drawing.quota, algorithm),
    };
    let clock = ManualClock::at(Millis(START));
    let store = MemoryStore::new(clock.clone());
    let mut running: VecDeque<(u64, Reservation)> = VecDeque::new();
    let mut admitted: Vec<u64> = Vec::new();
    let mut rows = Vec::new();
    for second in 0..SECONDS {
        let (asked, mut taken) = (asked(second), 0);
        for request in 0..asked {
            let now = second * 1_000 + request * 1_000 / asked;
            clock.set(Millis(START + now));
            while running.front().is_some_and(|(end, _)| *end <= now) {
                running.pop_front().map(|(_, reservation)| reservation.settle(&[]));
            }
            if let Decision::Granted(reservation) = store.reserve(charge(&limit, "u", 1)) {
                taken += 1;
                running.push_back((now + 3_000, reservation));
            }
        }
        admitted.push(taken);
        let shown = match drawing.algorithm {
            Algorithm::Concurrency => {
                running.iter().filter(|(end, _)| *end > second * 1_000 + 999).count() as u64
            }
            _ => admitted.iter().rev().take(60).sum(),
        };
        rows.push((asked, taken, shown));
    }
    rows
}

fn draw(drawing: &Drawing) -> String {
    let rows = run(drawing);
    let mut svg = String::new();
    let mut put = |text: String| writeln!(svg, "{text}").expect("a String takes any text");
    let text = |x: u64, y: u64, anchor: &str, fill: &str, text: &str| {
        format!("<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{text}</text>")
    };
    put(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} 310\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\">"
    ));
    put(format!("<title>{}: asked and admitted per second, and {}</title>", drawing.title, drawing.line));
    put(format!("<rect width=\"{WIDTH}\" height=\"310\" fill=\"#ffffff\"/>"));
    put(text(LEFT, 18, "start", "#111111", drawing.title));
    let (all, taken) = rows.iter().fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    put(text(WIDTH - 10, 18, "end", "#555555", &format!("{taken} of {all} requests admitted")));
    for (second, (asked, taken, _)) in rows.iter().enumerate() {
        let x = LEFT + second as u64 * SCALE;
        for (count, fill) in [(asked, "#d4d4d8"), (taken, "#2563eb")] {
            let height = count * BARS.1;
            if height > 0 {
                let y = BARS.0 - height;
                put(format!("<rect x=\"{x}\" y=\"{y}\" width=\"3\" height=\"{height}\" fill=\"{fill}\"/>"));
            }
        }
    }
    put(text(LEFT - 6, BARS.0 - 10 * BARS.1 + 4, "end", "#555555", "10/s"));
    let most = rows.iter().map(|row| row.2).chain(drawing.marks.iter().copied()).max().unwrap_or(1);
    let height = |count: u64| LINE.0 - count * (LINE.1 - 20) / most;
    put(text(LEFT, LINE.0 - LINE.1 - 2, "start", "#555555", drawing.line));
    for mark in drawing.marks {
        let (y, right) = (height(*mark), LEFT + SECONDS * SCALE);
        let dashes = "stroke=\"#dc2626\" stroke-dasharray=\"4 3\"";
        put(format!("<path d=\"M{LEFT} {y}H{right}\" {dashes} fill=\"none\"/>"));
        put(text(LEFT - 6, y + 4, "end", "#dc2626", &mark.to_string()));
    }
    let points: Vec<String> = rows
        .iter()
        .enumerate()
        .map(|(second, row)| format!("{} {}", LEFT + second as u64 * SCALE + 1, height(row.2)))
        .collect();
    put(format!("<path d=\"M{}\" fill=\"none\" stroke=\"#2563eb\" stroke-width=\"1.5\"/>", points.join("L")));
    for second in (0..=SECONDS).step_by(60) {
        let x = LEFT + second * SCALE;
        put(format!("<path d=\"M{x} 28V{}\" stroke=\"#e4e4e7\" fill=\"none\"/>", LINE.0 + 6));
        let anchor = if second == SECONDS { "end" } else { "middle" };
        put(text(x.min(WIDTH - 10), LINE.0 + 20, anchor, "#555555", &format!("{second} s")));
    }
    put(text(
        LEFT,
        LINE.0 + 36,
        "start",
        "#555555",
        "grey: asked for, blue: admitted, red: the limit and the most there can be",
    ));
    put("</svg>".into());
    svg
}

#[test]
fn the_pictures_are_what_the_engine_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/img");
    for drawing in &DRAWINGS {
        let path = folder.join(format!("limit-{}.svg", drawing.file));
        let svg = draw(drawing);
        if std::env::var_os("UPDATE_PICTURES").is_some() {
            std::fs::write(&path, &svg).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(svg == committed, "{} is not what the engine does now", path.display());
    }
}

/// What the text beside the pictures says about them.
#[test]
fn the_pictures_show_the_guarantees() {
    let most = |index: usize| run(&DRAWINGS[index]).iter().map(|row| row.2).max().unwrap_or(0);
    assert!((110..=120).contains(&most(0)), "fixed_window: twice the limit around the end of a minute");
    assert!((61..120).contains(&most(1)), "sliding_window: over the limit, but less");
    assert_eq!(most(2), 60, "moving_window: never");
    assert!((61..=80).contains(&most(3)), "token_bucket: at most limit and burst");
    assert_eq!(most(4), 12, "concurrency");
}

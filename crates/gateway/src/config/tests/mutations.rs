//! Whatever happens to a file: an answer, and a place in the file for every problem.

use super::{Severity, load, load_file};

const EXAMPLES: [&str; 7] = [
    include_str!("../../../../../examples/budgets.yml"),
    include_str!("../../../../../examples/minimal.yml"),
    include_str!("../../../../../examples/team.yml"),
    include_str!("../../../../../examples/fallback.yml"),
    include_str!("../../../../../examples/local-vllm.yml"),
    include_str!("../../../../../examples/sentinel.yml"),
    include_str!("../../../../../examples/cluster.yml"),
];

fn any(name: &str) -> Option<String> {
    Some(format!("value-of-{name}"))
}

fn upstream(name: &str) -> Option<String> {
    match name {
        "VLLM_URL" => None,
        name if name.starts_with("REDIS") || name.starts_with("TOLLGATE") || name.starts_with("RATE") => None,
        "API_KEYS" | "REQUEST_RATE_LIMIT" => None,
        name => any(name),
    }
}

#[test]
fn examples_load_without_a_word() {
    for example in EXAMPLES {
        let loaded = load_file(example, &upstream).map_err(|problems| super::lines(&problems)).unwrap();
        assert_eq!(super::lines(&loaded.warnings), [""; 0]);
        assert!(!loaded.config.models.is_empty() && !loaded.config.rules.is_empty());
    }
}

#[test]
fn a_damaged_file_is_answered_with_places_in_it() {
    let mut random = fastrand::Rng::with_seed(7);
    let (mut refused, mut accepted) = (0, 0);
    for round in 0..2_000 {
        let mut text = EXAMPLES[round % EXAMPLES.len()].as_bytes().to_vec();
        for _ in 0..random.usize(1..4) {
            text = damage(text, &mut random);
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let env: super::Environment<'_> = if random.bool() { &any } else { &upstream };
        match load(Some(("t.yml", &text)), env) {
            Ok(_) => accepted += 1,
            Err(problems) => {
                refused += 1;
                assert!(problems.iter().any(|problem| problem.severity == Severity::Error), "{text}");
                let last = u32::try_from(text.lines().count()).unwrap() + 1;
                for problem in problems.iter().filter(|problem| problem.file != "environment") {
                    let width =
                        text.lines().nth(problem.line as usize - 1).map_or(0, |line| line.chars().count());
                    assert!((1..=last).contains(&problem.line), "{problem}\n{text}");
                    assert!(problem.col >= 1 && problem.col as usize <= width + 2, "{problem}\n{text}");
                }
            }
        }
    }
    assert!(refused > 500 && accepted > 50, "{refused} refused, {accepted} accepted");
}

fn damage(mut text: Vec<u8>, random: &mut fastrand::Rng) -> Vec<u8> {
    if text.is_empty() {
        return b"models:".to_vec();
    }
    let at = random.usize(..text.len());
    let start = text[..at].iter().rposition(|b| *b == b'\n').map_or(0, |newline| newline + 1);
    let end = text[at..].iter().position(|b| *b == b'\n').map_or(text.len(), |newline| at + newline + 1);
    match random.u8(..7) {
        0 => text[at] ^= 1 << random.u8(..7),
        1 => text[at] = random.choice(b"{}[]:-#&*!|>'\"%@`$, \t~<\0".iter().copied()).unwrap(),
        2 => drop(text.drain(start..end)),
        3 => drop(text.splice(start..start, std::iter::repeat_n(b' ', random.usize(1..5)))),
        4 => {
            let indent = text[start..end].iter().take_while(|b| **b == b' ').count();
            text.drain(start..start + indent.min(random.usize(1..5)));
        }
        5 => {
            let line = text[start..end].to_vec();
            text.splice(start..start, line);
        }
        _ => text.truncate(at),
    }
    text
}

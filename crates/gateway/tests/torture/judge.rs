//! What must hold of the answers that callers got.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::World;
use super::support::{Answer, windows};

/// Gateways.
pub(crate) const N: u64 = 4;
/// Units in a window.
pub(crate) const LIMIT: u64 = 40;
pub(crate) const WINDOW: Duration = Duration::from_secs(2);
pub(crate) const STRATEGIES: [&str; 4] = ["fixed_window", "sliding_window", "moving_window", "token_bucket"];

/// One fault, from its beginning until all gateways counted in Redis again.
pub(crate) struct Episode {
    pub(crate) fault: &'static str,
    /// A gateway was killed meanwhile, too.
    pub(crate) killed: bool,
    pub(crate) began: Instant,
    pub(crate) shared: Instant,
    /// From the end of the fault.
    pub(crate) recovery: Duration,
}

impl Episode {
    /// Whether Redis forgot what it had counted.
    pub(crate) fn loses(&self) -> bool {
        matches!(self.fault, "killed, started again" | "FLUSHALL")
    }
}

/// The most that was admitted in windows of one kind, and the bound.
#[derive(Default)]
pub(crate) struct Most {
    pub(crate) windows: u64,
    pub(crate) admitted: u64,
    pub(crate) bound: u64,
}

pub(crate) type Admissions = BTreeMap<(&'static str, &'static str), Most>;

/// What happened between two moments, as far as limits care.
pub(crate) fn kind(
    episodes: &[Episode],
    answers: &[Answer],
    from: Instant,
    to: Instant,
) -> (&'static str, u64) {
    // What was counted in the window before may count in this one.
    let from = from.checked_sub(WINDOW).unwrap_or(from);
    let touching = episodes.iter().filter(|episode| episode.began <= to && episode.shared >= from);
    let (mut failed, mut lost, mut killed) = (0, false, 0);
    for episode in touching {
        lost |= episode.loses();
        killed += u64::from(episode.killed);
        failed += 1;
    }
    let unshared =
        answers.iter().any(|answer| answer.sent <= to && answer.came >= from && !answer.is_shared());
    let bound = LIMIT + (N - 1 + killed) * LIMIT.div_ceil(N);
    match (lost, failed > 0 || unshared) {
        (true, _) => ("counts lost", bound + LIMIT),
        (_, true) => ("a fault", bound),
        _ => ("none", LIMIT),
    }
}

/// Judges every window of every user.
pub(crate) fn judge(world: &mut World, answers: &[Answer]) -> Admissions {
    let mut most = Admissions::new();
    for user in STRATEGIES {
        let own: Vec<Answer> =
            answers.iter().copied().filter(|answer| answer.user == user && answer.status > 1).collect();
        let mut spans: Vec<(Instant, Instant, u64, u64, bool)> = Vec::new();
        if user == "fixed_window" {
            let of = windows(&own, user);
            spans.extend(
                of.iter()
                    .map(|window| (window.from, window.to, window.admitted, window.refused, window.alone)),
            );
        } else {
            let mut admitted: Vec<&Answer> = own.iter().filter(|answer| answer.is_admitted()).collect();
            admitted.sort_unstable_by_key(|answer| answer.sent);
            for (index, first) in admitted.iter().enumerate() {
                let end = first.sent + WINDOW;
                // Asked and answered within a window, they were decided within it.
                let within = admitted[index..].iter().take_while(|answer| answer.sent <= end);
                spans.push((
                    first.sent,
                    end,
                    within.filter(|answer| answer.came <= end).count() as u64,
                    0,
                    false,
                ));
            }
        }
        let mut from = 0;
        for (start, end, admitted, refused, alone) in spans {
            let early = start.checked_sub(2 * WINDOW).unwrap_or(start);
            while own[from].came < early {
                from += 1;
            }
            let near = &own[from..];
            let near = &near[..near.partition_point(|answer| answer.came <= end + WINDOW)];
            let (mut kind, mut bound) = kind(&world.episodes, near, start, end);
            if alone
                && kind == "a fault"
                && !world.episodes.iter().any(|e| e.killed && e.shared >= early && e.began <= end)
            {
                (kind, bound) = ("Redis away throughout", LIMIT + N);
            }
            let twice = if matches!(user, "sliding_window" | "token_bucket") { 2 } else { 1 };
            let short = user == "fixed_window" && kind == "none" && refused > 0 && admitted < LIMIT;
            if short {
                world.violations.push(format!("{user}: {refused} refused with {admitted} admitted"));
            }
            let most = most.entry((user, kind)).or_default();
            most.windows += 1;
            most.admitted = most.admitted.max(admitted);
            most.bound = most.bound.max(bound * twice);
            if admitted > bound * twice {
                world
                    .violations
                    .push(format!("{user}, {kind}: {admitted} admitted, at most {}", bound * twice));
            }
        }
    }
    most
}

/// No failure reaches a caller, but a broken connection of one whose gateway was killed.
pub(crate) fn judge_statuses(world: &mut World, answers: &[Answer]) -> BTreeMap<u16, u64> {
    let mut statuses = BTreeMap::new();
    for answer in answers {
        *statuses.entry(answer.status).or_default() += 1;
        let killed = |episode: &Episode| {
            episode.killed && episode.began <= answer.came && answer.sent <= episode.shared
        };
        let excused = answer.status == 0 && world.episodes.iter().any(killed);
        if !matches!(answer.status, 200 | 429) && !excused {
            world.violations.push(format!("{answer:?}"));
        }
    }
    statuses
}

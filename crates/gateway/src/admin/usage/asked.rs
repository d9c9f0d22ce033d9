//! What is asked of usage: by whom or what, from when to when, in which steps. Only what is kept can be asked for, which
//! bounds how much is read.

use crate::admin::ask::{Ask, no_cursor, refuse};
use crate::admin::problem::{Fault, Problem};
use crate::config::{self, Retention};
use crate::control::{Bucket, Span, Time, UsageRow};

use super::Line;

/// How far back it is looked when nothing says so.
const RECENT_SECONDS: u64 = 86_400;
/// The end of the year 9999; Unix seconds.
const MOMENT_MAX: u64 = 253_402_300_799;

/// What each line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    User,
    ApiKey,
    Team,
    Model,
}

/// How time is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Hour,
    Day,
    /// Not at all.
    None,
}

/// How it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Csv,
}

/// A part of the time; Unix seconds. The end is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// One question.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) by: By,
    pub(super) format: Format,
    step: Step,
    /// Whole hours, or days.
    time: Slot,
    filter: UsageFilter,
    /// Where the page before ended: the beginning of a slot, and a name.
    after: Option<(u64, Option<String>)>,
}

/// Only these; of an empty name: what has none.
#[derive(Debug, Default)]
struct UsageFilter([Option<String>; 4]);

impl By {
    const ALL: [Self; 4] = [Self::User, Self::ApiKey, Self::Team, Self::Model];

    /// As in the query, in answers and in a CSV's header.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::ApiKey => "api_key",
            Self::Team => "team",
            Self::Model => "model",
        }
    }

    fn of(self, row: &UsageRow) -> Option<&str> {
        match self {
            Self::User => row.user.as_deref(),
            Self::ApiKey => row.api_key.as_deref(),
            Self::Team => row.team.as_deref(),
            Self::Model => row.model.as_deref(),
        }
    }

    /// What this says of a row.
    pub(super) fn take(self, row: UsageRow) -> Option<String> {
        match self {
            Self::User => row.user,
            Self::ApiKey => row.api_key,
            Self::Team => row.team,
            Self::Model => row.model,
        }
    }
}

impl Step {
    /// Of one slot of a time.
    fn seconds(self, time: Slot) -> u64 {
        match self {
            Self::Hour => Span::Hour.seconds(),
            Self::Day => Span::Day.seconds(),
            Self::None => time.end - time.start,
        }
    }
}

impl Slot {
    /// What is read for it: whole days as such, the rest by the hour.
    pub(super) fn buckets(self) -> impl Iterator<Item = Bucket> {
        let (day, hour) = (Span::Day.seconds(), Span::Hour.seconds());
        let first_midnight = self.start.next_multiple_of(day).min(self.end);
        let last_midnight = Span::Day.start(self.end).max(first_midnight);
        let of = |span| move |start| Bucket { span, start };
        let before = (self.start..first_midnight).step_by(hour as usize).map(of(Span::Hour));
        let days = (first_midnight..last_midnight).step_by(day as usize).map(of(Span::Day));
        let after = (last_midnight..self.end).step_by(hour as usize).map(of(Span::Hour));
        before.chain(days).chain(after)
    }
}

impl Question {
    /// What a request asks at this moment, Unix seconds, where so much is kept.
    pub(super) fn read(ask: &Ask, now: u64, retention: &Retention) -> Result<Self, Problem> {
        let mut faults = Vec::new();
        let by = one_of(ask, "by", By::ALL.map(|by| (by.as_str(), by)), By::User, &mut faults);
        let steps = [("hour", Step::Hour), ("day", Step::Day), ("none", Step::None)];
        let step = one_of(ask, "step", steps, Step::None, &mut faults);
        let usual = if ask.accepts("text/csv") { Format::Csv } else { Format::Json };
        let formats = [("json", Format::Json), ("csv", Format::Csv)];
        let format = one_of(ask, "format", formats, usual, &mut faults);
        let from = moment(ask, "from", &mut faults);
        let to = moment(ask, "to", &mut faults);
        if format == Format::Csv {
            for field in ["limit", "cursor"] {
                if ask.parameter(field).is_some_and(|value| !value.is_empty()) {
                    faults.push(fault(field, "a CSV has no pages: it has all rows"));
                }
            }
        }
        refuse(faults)?;
        let kept = Kept { now, retention };
        let (time, after) = match ask.page()?.after {
            // The pages of one list are about one time, however long it takes to turn them.
            Some(after) => {
                let (time, after) = place(&after).ok_or_else(no_cursor)?;
                let is_kept = kept.time(step, Some(time.start), Some(time.end)).ok() == Some(time);
                let is_slot = (after.0 - time.start).is_multiple_of(step.seconds(time));
                if !is_kept || !is_slot {
                    return Err(no_cursor());
                }
                (time, Some(after))
            }
            None => (kept.time(step, from, to)?, None),
        };
        let filter = UsageFilter(By::ALL.map(|by| ask.parameter(by.as_str()).map(str::to_owned)));
        Ok(Self { by, format, step, time, filter, after })
    }

    /// The parts of the time that are still to be told of, in order.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        let length = self.step.seconds(self.time);
        let from = self.after.as_ref().map_or(self.time.start, |(start, _)| *start);
        let starts = (from..self.time.end).step_by(usize::try_from(length).unwrap_or(usize::MAX));
        starts.map(move |start| Slot { start, end: start + length })
    }

    /// Whether a row is asked about; `model` is the resolved name of the one that is.
    pub(super) fn wants(&self, row: &UsageRow, model: Option<&str>) -> bool {
        By::ALL.iter().zip(&self.filter.0).all(|(by, wanted)| match wanted.as_deref() {
            None => true,
            Some(wanted) => {
                let said = by.of(row);
                said.unwrap_or_default() == wanted || (*by == By::Model && said.is_some() && said == model)
            }
        })
    }

    /// The model that is asked about, as it was written.
    pub(super) fn model(&self) -> Option<&str> {
        let [_, _, _, model] = &self.filter.0;
        model.as_deref()
    }

    /// Whether a line comes after what the page before ended with.
    pub(super) fn is_ahead(&self, slot: Slot, name: Option<&str>) -> bool {
        self.after.as_ref().is_none_or(|(start, last)| (slot.start, name) > (*start, last.as_deref()))
    }

    /// Where a line stands.
    pub(super) fn place(&self, line: &Line) -> String {
        let name = line.name.as_ref().map_or_else(String::new, |name| format!("={name}"));
        format!("{} {} {} {name}", self.time.start, self.time.end, line.slot.start)
    }
}

/// The time that a place is of, and the place: a slot of it and a name.
fn place(text: &str) -> Option<(Slot, (u64, Option<String>))> {
    let mut parts = text.splitn(4, ' ');
    let mut number = || parts.next()?.parse::<u64>().ok().filter(|&number| number <= MOMENT_MAX);
    let (time, start) = (Slot { start: number()?, end: number()? }, number()?);
    let name = parts.next()?;
    let name = if name.is_empty() { None } else { Some(name.strip_prefix('=')?.to_owned()) };
    (time.start..time.end).contains(&start).then_some((time, (start, name)))
}

/// What is kept now.
struct Kept<'a> {
    now: u64,
    retention: &'a Retention,
}

impl Kept<'_> {
    /// The earliest hour or day that is there for certain.
    fn since(&self, span: Span) -> u64 {
        span.start(self.now.saturating_sub(span.kept(self.retention).as_secs()))
    }

    /// Whole hours or days around what is asked for, as far as they have begun.
    fn time(&self, step: Step, from: Option<u64>, to: Option<u64>) -> Result<Slot, Problem> {
        let to = to.unwrap_or(MOMENT_MAX);
        let from = from.unwrap_or(to.min(self.now).saturating_sub(RECENT_SECONDS));
        if from >= to {
            return Err(Problem::field("from", "is not before `to`"));
        }
        if from > self.now {
            return Err(Problem::field("from", "lies in the future"));
        }
        let of = |span: Span| {
            let end = to.min(self.now + 1).next_multiple_of(span.seconds());
            Slot { start: span.start(from), end }
        };
        let mut time = of(if step == Step::Day { Span::Day } else { Span::Hour });
        if step == Step::None {
            // Of what is that old, only days are known.
            let hours = self.since(Span::Hour);
            if time.start < hours {
                time.start = of(Span::Day).start;
            }
            if Span::Day.start(time.end).max(time.start) < hours {
                time.end = of(Span::Day).end;
            }
        }
        let span = if step == Step::Hour { Span::Hour } else { Span::Day };
        let since = self.since(span);
        if span.start(time.start) < since {
            let since = Time::from(std::time::UNIX_EPOCH + std::time::Duration::from_secs(since));
            let detail = match span {
                Span::Hour => format!("hours are kept since {since}; step=day goes further back"),
                Span::Day => format!("days are kept since {since}"),
            };
            return Err(Problem::field("from", detail));
        }
        Ok(time)
    }
}

/// RFC 3339, a date, or Unix seconds.
fn moment(ask: &Ask, field: &'static str, faults: &mut Vec<Fault>) -> Option<u64> {
    let text = ask.parameter(field).filter(|text| !text.is_empty())?;
    let read = match text.bytes().all(|byte| byte.is_ascii_digit()) {
        // What is too large for a number is too large for a moment.
        true => Ok(text.parse().unwrap_or(u64::MAX)),
        false => config::date(text).map(|time| Time::from(time).unix_seconds()),
    };
    match read {
        Ok(seconds) if seconds <= MOMENT_MAX => return Some(seconds),
        Ok(_) => faults.push(fault(field, "is too far away; Unix seconds are meant, not milliseconds")),
        Err(why) => faults.push(fault(field, &format!("{why}, or Unix seconds"))),
    }
    None
}

fn one_of<T: Copy, const N: usize>(
    ask: &Ask,
    field: &'static str,
    words: [(&'static str, T); N],
    usual: T,
    faults: &mut Vec<Fault>,
) -> T {
    let Some(said) = ask.parameter(field).filter(|said| !said.is_empty()) else { return usual };
    match words.iter().find(|(word, _)| *word == said) {
        Some((_, value)) => *value,
        None => {
            faults.push(fault(field, &format!("is none of {}", words.map(|(word, _)| word).join(", "))));
            usual
        }
    }
}

fn fault(field: &str, detail: &str) -> Fault {
    Fault { field: field.to_owned(), detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HOUR: u64 = 3_600;
    const DAY: u64 = 86_400;
    /// 20:46 of a day.
    const NOW: u64 = 20_000 * DAY + 20 * HOUR + 46 * 60;
    const RETENTION: Retention =
        Retention { hours: Duration::from_secs(35 * DAY), days: Duration::from_secs(400 * DAY) };

    fn time(step: Step, from: Option<u64>, to: Option<u64>) -> Result<Slot, Problem> {
        Kept { now: NOW, retention: &RETENTION }.time(step, from, to)
    }

    fn slot(start: u64, end: u64) -> Slot {
        Slot { start, end }
    }

    #[test]
    fn a_time_is_whole_hours_or_days_as_far_as_they_have_begun() {
        let today = 20_000 * DAY;
        let recent = slot(today - 4 * HOUR, today + 21 * HOUR);
        for (step, from, to, wanted) in [
            (Step::None, None, None, recent),
            (Step::Hour, None, None, recent),
            (Step::Day, None, None, slot(today - DAY, today + DAY)),
            (Step::Hour, Some(NOW), None, slot(today + 20 * HOUR, today + 21 * HOUR)),
            (Step::Hour, Some(today), Some(today + 1), slot(today, today + HOUR)),
            (Step::Hour, Some(today + 1), Some(today + HOUR), slot(today, today + HOUR)),
            (Step::Hour, Some(today), Some(MOMENT_MAX), slot(today, today + 21 * HOUR)),
            (Step::Day, Some(today + 1), Some(today + 2), slot(today, today + DAY)),
            (Step::None, None, Some(today), slot(today - DAY, today)),
        ] {
            assert_eq!(time(step, from, to).ok(), Some(wanted), "{step:?} {from:?} {to:?}");
        }
        for (step, from, to) in [
            (Step::None, Some(NOW), Some(NOW)),
            (Step::None, Some(NOW + 1), None),
            (Step::Hour, Some(NOW - 35 * DAY - HOUR), None),
            (Step::Day, Some(NOW - 401 * DAY), None),
            (Step::None, Some(0), Some(1)),
            (Step::None, None, Some(0)),
        ] {
            assert!(time(step, from, to).is_err(), "{step:?} {from:?} {to:?}");
        }
    }

    #[test]
    fn what_is_read_is_kept_and_read_once() {
        let kept = Kept { now: NOW, retention: &RETENTION };
        let (hours, days) = (kept.since(Span::Hour), kept.since(Span::Day));
        let mut random = fastrand::Rng::with_seed(3);
        let mut asked = 0;
        for _ in 0..20_000 {
            // Many about the moment when hours are forgotten, and about now.
            let around = [NOW, NOW - 35 * DAY, NOW - 399 * DAY][random.usize(..3)];
            let from = (around - 3 * DAY + random.u64(..6 * DAY)).min(NOW);
            let length = [HOUR, 3 * DAY, 60 * DAY][random.usize(..3)];
            let to = from + 1 + random.u64(..length);
            for step in [Step::None, Step::Hour, Step::Day] {
                let Ok(time) = time(step, Some(from), Some(to)) else {
                    assert!(
                        from < if step == Step::Hour { hours } else { days + DAY },
                        "{step:?} {from} {to}"
                    );
                    continue;
                };
                asked += 1;
                assert!(time.start <= from && time.end >= to.min(NOW + 1), "{time:?} {from} {to}");
                assert!(time.start + DAY > from && time.end < to.min(NOW + 1) + DAY, "{time:?} {from} {to}");
                let mut at = time.start;
                let question = question(step, time);
                for bucket in question.slots().flat_map(Slot::buckets) {
                    assert_eq!(bucket.start, at, "{step:?} {time:?}");
                    assert!(bucket.start >= if bucket.span == Span::Hour { hours } else { days }, "{time:?}");
                    at += bucket.span.seconds();
                }
                assert_eq!(at, time.end, "{step:?} {time:?}");
            }
        }
        assert!(asked > 20_000, "{asked}");
    }

    fn question(step: Step, time: Slot) -> Question {
        let filter = UsageFilter::default();
        Question { by: By::User, format: Format::Json, step, time, filter, after: None }
    }

    #[test]
    fn a_place_leads_on_from_where_it_is() {
        let slot = slot(2 * HOUR, 3 * HOUR);
        for name in [None, Some("a"), Some(""), Some("a b = c"), Some("ü")] {
            let time = Slot { start: HOUR, end: 5 * HOUR };
            let line =
                Line { slot, name: name.map(str::to_owned), counts: crate::control::Counts::default() };
            let written = question(Step::Hour, time).place(&line);
            let (read, after) = place(&written).expect("it was written so");
            assert_eq!((read, &after), (time, &(slot.start, line.name.clone())), "{written}");
            let next = Question { after: Some(after), ..question(Step::Hour, time) };
            assert_eq!(next.slots().map(|slot| slot.start / HOUR).collect::<Vec<_>>(), [2, 3, 4]);
            assert!(!next.is_ahead(slot, name), "{written}");
            assert!(
                next.is_ahead(slot, Some("\u{10ffff}"))
                    && next.is_ahead(Slot { start: 3 * HOUR, ..slot }, None)
            );
        }
        for junk in
            ["", "1 2 1", "1 2 3 ", "2 1 1 ", "1 2 1 a", "-1 2 1 ", "1 99999999999999999999 1 ", "1 2 1 =a\0"]
        {
            assert_eq!(place(junk).is_some(), junk.ends_with('\0'), "{junk}");
        }
    }
}

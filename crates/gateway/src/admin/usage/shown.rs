//! Usage as JSON and as CSV.

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Line;
use super::asked::By;
use crate::control::{Counts, Time};

/// Columns of a CSV after `start`, `end` and who or what it is about.
const COLUMNS: &str = "requests,refused,estimated,input_tokens,cached_input_tokens,output_tokens,reasoning_tokens,\
                       total_tokens,cost";

/// One line.
pub(super) fn object(by: By, line: &Line) -> Value {
    let Counts { requests, refused, estimated, input, cached_input, output, reasoning, total, cost } =
        line.counts;
    json!({
        "start": time(line.slot.start),
        "end": time(line.slot.end),
        (by.as_str()): line.name,
        "requests": requests,
        "refused": refused,
        "estimated": estimated,
        "tokens": {
            "input": input,
            "cached_input": cached_input,
            "output": output,
            "reasoning": reasoning,
            "total": total,
        },
        "cost": cost as f64 / 1e6,
    })
}

/// All lines after one of names: RFC 4180. Of a name that a spreadsheet would take for a formula it sees a quote first.
pub(super) fn csv(by: By, lines: &[Line]) -> String {
    let mut csv = format!("start,end,{},{COLUMNS}\r\n", by.as_str());
    for line in lines {
        let Counts { requests, refused, estimated, input, cached_input, output, reasoning, total, cost } =
            line.counts;
        let (start, end) = (time(line.slot.start), time(line.slot.end));
        let name = field(line.name.as_deref().unwrap_or_default());
        let (whole, micros) = (cost / 1_000_000, cost % 1_000_000);
        writeln!(
            csv,
            "{start},{end},{name},{requests},{refused},{estimated},{input},{cached_input},{output},{reasoning},{total},\
             {whole}.{micros:06}\r"
        )
        .expect("writing to a String does not fail");
    }
    csv
}

fn field(text: &str) -> String {
    let guarded = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = if guarded { format!("'{text}") } else { text.to_owned() };
    match text.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

fn time(seconds: u64) -> Time {
    (UNIX_EPOCH + Duration::from_secs(seconds)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_one_field_and_no_formula() {
        for (text, written) in [
            ("", ""),
            ("alice", "alice"),
            ("a b", "a b"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("a\r\nb", "\"a\r\nb\""),
            ("=1+1", "'=1+1"),
            ("+1", "'+1"),
            ("-1", "'-1"),
            ("@a", "'@a"),
            ("=a,\"b\"", "\"'=a,\"\"b\"\"\""),
        ] {
            assert_eq!(field(text), written);
        }
    }
}

//! How a subject and a limit are written: short, and with a checksum, because a database of pages does not look at
//! every byte it returns.

use std::sync::Arc;

use crate::limit::Limit;
use crate::memory::shard::{Class, Row};
use crate::scope::{Dimension, Scope};

/// The most counters of a subject, and numbers of a counter, that make sense.
const COUNTERS_MAX: u64 = 4_096;
const NUMBERS_MAX: u64 = 1_024;
const CHECKSUM_BYTES: usize = 8;

/// Class, number of counters; of each the number of its limit, how many numbers, and the numbers: all as LEB128. Then
/// a checksum of that and the subject.
pub(super) fn encode(row: &Row, mut number_of: impl FnMut(&Arc<Limit>) -> u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    put(&mut bytes, u64::from(row.class == Class::Unauthenticated));
    put(&mut bytes, row.counters.len() as u64);
    for (limit, numbers) in &row.counters {
        put(&mut bytes, number_of(limit));
        put(&mut bytes, numbers.len() as u64);
        numbers.iter().for_each(|number| put(&mut bytes, *number));
    }
    let checksum = checksum(row.subject.as_bytes(), &bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

/// `None`: no row.
pub(super) fn decode(
    subject: &str,
    bytes: &[u8],
    mut limit_of: impl FnMut(u64) -> Option<Arc<Limit>>,
) -> Option<Row> {
    let (mut bytes, found) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
    if checksum(subject.as_bytes(), bytes) != u64::from_le_bytes(*found) {
        return None;
    }
    let class = match take(&mut bytes)? {
        0 => Class::Keyed,
        1 => Class::Unauthenticated,
        _ => return None,
    };
    let mut counters = Vec::new();
    for _ in 0..take(&mut bytes).filter(|count| *count <= COUNTERS_MAX)? {
        let limit = limit_of(take(&mut bytes)?)?;
        let count = take(&mut bytes).filter(|count| *count <= NUMBERS_MAX)?;
        let numbers: Option<Vec<u64>> = (0..count).map(|_| take(&mut bytes)).collect();
        counters.push((limit, numbers?));
    }
    bytes.is_empty().then(|| Row { subject: Arc::from(subject), class, counters })
}

/// Rule, quota, algorithm, scope and whether it is a shadow, with tabs between: none of them has one.
pub(super) fn limit_text(limit: &Limit) -> String {
    let shadow = if limit.is_shadow() { "shadow" } else { "" };
    let (rule, quota, algorithm) = (limit.rule(), limit.quota(), limit.algorithm());
    format!("{rule}\t{quota}\t{algorithm}\t{}\t{shadow}", limit.scope())
}

/// `None`: no limit.
pub(super) fn limit_of_text(text: &str) -> Option<Arc<Limit>> {
    let parts: Vec<&str> = text.split('\t').collect();
    let [rule, quota, algorithm, scope, shadow] = parts[..] else { return None };
    let scope = match scope {
        "global" => Scope::GLOBAL,
        dimensions => {
            let dimensions: Result<Vec<Dimension>, _> = dimensions.split(',').map(str::parse).collect();
            Scope::of(dimensions.ok()?)
        }
    };
    let limit = Limit::new(rule, quota.parse().ok()?, algorithm.parse().ok()?, scope).ok()?;
    Some(Arc::new(if shadow == "shadow" { limit.shadow() } else { limit }))
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// FNV-1a, 64 bits: against accidents, not against people who can write the file.
fn checksum(subject: &[u8], bytes: &[u8]) -> u64 {
    let all = subject.iter().chain(&[0xff]).chain(bytes);
    all.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::Algorithm;

    fn limits() -> Vec<Arc<Limit>> {
        let scope = Scope::of([Dimension::User, Dimension::Model]);
        let new =
            |quota: &str, algorithm, scope| Limit::new("r \"x", quota.parse().unwrap(), algorithm, scope);
        assert!(new("1/day", Algorithm::FixedWindow, scope).is_err(), "no quotes in names");
        let new = |quota: &str, algorithm, scope| {
            Limit::new("été x", quota.parse().unwrap(), algorithm, scope).unwrap()
        };
        [
            new("$50/month", Algorithm::FixedWindow, Scope::GLOBAL),
            new("10k output tokens/15 minutes burst 7", Algorithm::TokenBucket, scope).shadow(),
            new("60/minute", Algorithm::MovingWindow, Scope::of(Dimension::ALL)),
        ]
        .map(Arc::new)
        .into()
    }

    #[test]
    fn limits_read_back() {
        for limit in limits() {
            let back = limit_of_text(&limit_text(&limit)).unwrap();
            assert!(back.same_counter(&limit));
            assert_eq!(
                (back.quota(), back.scope(), back.is_shadow()),
                (limit.quota(), limit.scope(), limit.is_shadow())
            );
        }
        for text in
            ["", "a\tb\tc\td\te", "r\t60/minute\tfixed_window\tglobal", "r\t1/day\tfixed_window\tplanet\t"]
        {
            assert!(limit_of_text(text).is_none(), "{text}");
        }
    }

    /// A row reads back; with any bit turned, or cut anywhere, or under another name, it is none.
    #[test]
    fn rows_read_back_or_are_none() {
        let limits = limits();
        let row = Row {
            subject: "user:a:model:b".into(),
            class: Class::Unauthenticated,
            counters: vec![
                (Arc::clone(&limits[0]), vec![1_794_614_400_000, 0, 127, 128]),
                (Arc::clone(&limits[2]), vec![1 << 53, u64::MAX]),
            ],
        };
        let number =
            |limit: &Arc<Limit>| limits.iter().position(|one| Arc::ptr_eq(one, limit)).unwrap() as u64;
        let limit_of = |number: u64| limits.get(number as usize).cloned();
        let bytes = encode(&row, number);
        let back = decode(&row.subject, &bytes, limit_of).unwrap();
        assert_eq!(
            (back.class, &back.counters[0].1, &back.counters[1].1),
            (row.class, &row.counters[0].1, &row.counters[1].1)
        );
        assert!(decode("user:a:model:c", &bytes, limit_of).is_none());
        assert!(decode(&row.subject, &bytes, |_| None).is_none());
        for place in 0..bytes.len() {
            assert!(decode(&row.subject, &bytes[..place], limit_of).is_none());
            for bit in 0..8 {
                let mut turned = bytes.clone();
                turned[place] ^= 1 << bit;
                assert!(decode(&row.subject, &turned, limit_of).is_none());
            }
        }
    }
}

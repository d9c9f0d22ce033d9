//! Limits, scopes and subjects: names, refusals, guarantees.

mod support;

use std::borrow::Cow;

use proptest::prelude::*;
use support::limit;
use tollgate_limiter::{Algorithm, Dimension, Limit, Quota, Scope, Subject, Unit, Window};

#[test]
fn an_id_is_rule_unit_window() {
    for (quota, id) in [
        ("60/minute", "free-requests-minute"),
        ("60/15 minutes", "free-requests-15-minutes"),
        ("10k tokens/day", "free-tokens-day"),
        ("10k input tokens/day", "free-input_tokens-day"),
        ("$50/month", "free-cost-month"),
    ] {
        assert_eq!(limit("free", quota, Algorithm::FixedWindow).id(), id);
    }
}

#[test]
fn guarantees_are_said_in_words() {
    use Algorithm::{FixedWindow, MovingWindow, SlidingWindow, TokenBucket};
    for (quota, algorithm, guarantee) in [
        ("60/minute", FixedWindow, "at most 60 per minute window, at most 120 in any 60 s"),
        (
            "10k tokens/15 minutes",
            FixedWindow,
            "at most 10000 tokens per 15 minutes window, at most 20000 in any 15 minutes",
        ),
        ("$50/month", TokenBucket, "at most $50 per calendar month (UTC), at most $100 in any 28 days"),
        ("60/hour", SlidingWindow, "at most 60 per hour on average, fewer than 120 in any 60 minutes"),
        ("60/day", MovingWindow, "at most 60 in any 24 hours"),
        ("60/10 s burst 5", TokenBucket, "at most 5 at once, at most 65 in any 10 s"),
        ("60/week", TokenBucket, "at most 60 at once, at most 120 in any 7 days"),
    ] {
        assert_eq!(limit("r", quota, algorithm).guarantee(), guarantee);
    }
}

#[test]
fn refusals_name_the_rule_and_the_way_out() {
    let refused = |rule: &str, quota: &str, algorithm| {
        let quota: Quota = quota.parse().unwrap();
        Limit::new(rule, quota, algorithm, Scope::GLOBAL).expect_err("refused").to_string()
    };
    for (text, said) in [
        (refused("r", "10/minute burst 5", Algorithm::FixedWindow), "burst needs token_bucket"),
        (refused("r", "10/month burst 5", Algorithm::TokenBucket), "burst needs token_bucket"),
        (refused("r", "20/minute", Algorithm::Concurrency), "write `20 concurrent`"),
        (refused("r", "$60k/day", Algorithm::TokenBucket), "write fixed_window"),
        (refused("r", "$60k/day", Algorithm::SlidingWindow), "write fixed_window"),
        (refused("", "1/day", Algorithm::FixedWindow), "1 to 128 bytes"),
        (refused("a\nb", "1/day", Algorithm::FixedWindow), "control characters"),
    ] {
        assert!(text.contains(said), "{text}");
        assert!(text.starts_with("rule `"), "{text}");
    }
    assert!(Window::from_secs(0).is_err());
    assert!(Quota::new(5, Unit::Concurrency, Window::from_secs(60).unwrap()).is_err());
}

#[test]
fn windows_of_seconds_take_the_largest_span() {
    for (seconds, shown) in [
        (1, "second"),
        (60, "minute"),
        (90, "90 seconds"),
        (900, "15 minutes"),
        (86_400, "day"),
        (604_800, "7 days"),
    ] {
        assert_eq!(Window::from_secs(seconds).unwrap().to_string(), shown);
    }
}

#[test]
fn subjects_are_canonical_and_never_collide() {
    let scope = Scope::of([Dimension::Model, Dimension::User]);
    let subject = |user: &'static str, model: &'static str| {
        scope.subject(|dimension| Cow::Borrowed(if dimension == Dimension::User { user } else { model }))
    };
    assert_eq!(subject("alice", "gpt-4o").as_str(), "user:alice:model:gpt-4o");
    assert_eq!(
        subject("a:model:b", "{c}%\n\u{85}é").as_str(),
        "user:a%3Amodel%3Ab:model:%7Bc%7D%25%0A%C2%85é"
    );
    assert_ne!(subject("a:model:b", "c"), subject("a", "b:model:c"));
    assert_eq!(Scope::GLOBAL.subject(|_| unreachable!()).as_str(), "global");
    for text in ["global", "user:alice:model:gpt-4o", "ip:1.2.3.4", "ip:2001%3Adb8", "endpoint:/v1/x"] {
        assert_eq!(text.parse::<Subject>().unwrap().as_str(), text);
    }
    for text in [
        "",
        "user",
        "user:a:b",
        "model:a:user:b",
        "user:a:user:b",
        "nobody:x",
        "global:x",
        "user:{x}",
        "user:a\n",
    ] {
        assert!(text.parse::<Subject>().is_err(), "{text}");
    }
    assert!(!subject("a", "b").is_unauthenticated());
    assert!(subject("a", "b").unauthenticated().is_unauthenticated());
}

#[test]
fn names_are_read_back_and_guessed() {
    for dimension in Dimension::ALL {
        assert_eq!(dimension.as_str().parse(), Ok(dimension));
        assert!(Scope::of([dimension]).contains(dimension));
    }
    for algorithm in Algorithm::ALL {
        assert_eq!(algorithm.as_str().parse(), Ok(algorithm));
    }
    assert_eq!(Scope::of(Dimension::ALL).iter().collect::<Vec<_>>(), Dimension::ALL);
    assert_eq!(Scope::of([Dimension::Model, Dimension::User]).to_string(), "user,model");
    assert_eq!(Scope::GLOBAL.to_string(), "global");
    let error = "apikey".parse::<Dimension>().unwrap_err();
    assert_eq!(error.suggestion(), Some("api_key"));
    assert_eq!(error.allowed().len(), 8);
    let error = "fixed".parse::<Algorithm>().unwrap_err().to_string();
    assert_eq!(
        error,
        "unknown strategy `fixed` (allowed: fixed_window, sliding_window, moving_window, token_bucket)"
    );
}

proptest! {
    /// Whatever is written is a quota that reads back the same, or a short refusal.
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,40}|[$]?[0-9_.]{1,12}[kMGm]? ?(tokens|request|input tokens)?( per |/)[0-9]{0,3} ?(s|minutes|day|week|month)( burst [0-9]{1,4})?") {
        match Quota::parse_all(&text) {
            Ok(quotas) => {
                for quota in quotas {
                    prop_assert_eq!(quota.to_string().parse::<Quota>(), Ok(quota));
                    for algorithm in Algorithm::ALL {
                        if let Ok(limit) = Limit::new("r", quota, algorithm, Scope::GLOBAL) {
                            prop_assert!(limit.guarantee().starts_with("at most "));
                        }
                    }
                }
            }
            Err(error) => prop_assert!(error.to_string().len() < 400),
        }
    }

    /// One quota, from whatever text, even with control characters: what is read is written so that it reads back the
    /// same; what is not, is refused in a sentence.
    #[test]
    fn any_text_is_one_quota_or_refused(text in prop_oneof![
        any::<String>(),
        "[ \\t0-9a-zA-Z/$._µ€-]{0,60}",
        "[0-9_]{1,20}[kMG]?(/| per )[0-9]{0,4} ?(s|second|min|minutes|h|day|week|w|month)( burst [0-9]{1,20}[kMG]?)?",
        "[0-9]{1,6} ?(concurrent|requests|tokens|output_tokens)?(/[a-z]{1,7})?",
    ]) {
        match text.parse::<Quota>() {
            Ok(quota) => {
                prop_assert_eq!(quota.to_string().parse::<Quota>(), Ok(quota));
                prop_assert!(quota.amount() > 0);
            }
            Err(error) => prop_assert!((10..400).contains(&error.to_string().len()), "{}", error),
        }
    }

    /// Different values never make the same subject, and the text reads back.
    #[test]
    fn any_values_make_their_own_subject(a in any::<[String; 2]>(), b in any::<[String; 2]>()) {
        let scope = Scope::of([Dimension::User, Dimension::Model]);
        let subject = |values: &[String; 2]| {
            scope.subject(|dimension| Cow::Owned(values[usize::from(dimension == Dimension::Model)].clone()))
        };
        prop_assert_eq!(subject(&a) == subject(&b), a == b);
        prop_assert_eq!(subject(&a).as_str().parse::<Subject>(), Ok(subject(&a)));
    }
}

use crate::quota::{Quota, Span, Unit, Window};

fn quota(text: &str) -> Quota {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn what_is_accepted() {
    let window = |count, span| Some(Window::new(count, span).unwrap());
    let cases = [
        ("60/minute", 60, Unit::Requests, window(1, Span::Minute)),
        (" 60 requests per minute ", 60, Unit::Requests, window(1, Span::Minute)),
        ("1 request/s", 1, Unit::Requests, window(1, Span::Second)),
        ("1_000/day", 1_000, Unit::Requests, window(1, Span::Day)),
        ("10k tokens/minute", 10_000, Unit::Tokens, window(1, Span::Minute)),
        ("10 k tokens/m", 10_000, Unit::Tokens, window(1, Span::Minute)),
        ("1.5M input tokens / 2 hours", 1_500_000, Unit::InputTokens, window(2, Span::Hour)),
        ("2G output_tokens/w", 2_000_000_000, Unit::OutputTokens, window(1, Span::Week)),
        ("10/15minutes", 10, Unit::Requests, window(15, Span::Minute)),
        ("10 per 30s", 10, Unit::Requests, window(30, Span::Second)),
        ("$50/month", 50_000_000, Unit::Cost, window(1, Span::Month)),
        ("$0.000001/d", 1, Unit::Cost, window(1, Span::Day)),
        ("$1.5k per week", 1_500_000_000, Unit::Cost, window(1, Span::Week)),
        ("1000000000/day", 1_000_000_000, Unit::Requests, window(1, Span::Day)),
        ("20 concurrent", 20, Unit::Concurrency, None),
        ("5/366 days", 5, Unit::Requests, window(366, Span::Day)),
    ];
    for (text, amount, unit, window) in cases {
        let quota = quota(text);
        assert_eq!((quota.amount(), quota.unit(), quota.window()), (amount, unit, window), "{text}");
        assert_eq!(quota.burst(), None, "{text}");
        assert_eq!(quota.to_string().parse(), Ok(quota), "{text} is displayed as {quota}");
    }
}

#[test]
fn bursts() {
    assert_eq!(quota("10/minute burst 5").burst(), Some(5));
    assert_eq!(quota("10/minute burst 5k").burst(), Some(5_000));
    assert_eq!(quota("$10/minute burst $2.5").burst(), Some(2_500_000));
    assert_eq!(quota("$10/minute burst 2.5").to_string(), "$10/minute burst $2.5");
}

#[test]
fn canonical() {
    for (text, canonical) in [
        ("1_000 requests per 1 minutes", "1000/minute"),
        ("10k tokens/15m", "10000 tokens/15 minutes"),
        ("$0.50/D".to_lowercase().as_str(), "$0.5/day"),
        ("7 CONCURRENT", "7 concurrent"),
    ] {
        assert_eq!(quota(text).to_string(), canonical);
    }
}

#[test]
fn what_is_refused_says_what_to_write() {
    let cases = [
        ("", "unlimited"),
        ("1m tokens/day", "for a million write M"),
        ("10K/minute", "for a thousand write k"),
        ("1B tokens/day", "for a billion write G"),
        ("0/minute", "deny: true"),
        ("0 concurrent", "deny: true"),
        ("$0/day", "deny: true"),
        ("10/minute burst 0", "leave it out"),
        ("60", "per what"),
        ("60 tokens", "per what"),
        ("60/", "second, minute"),
        ("60/minuet", "did you mean `minute`"),
        ("60/min", "did you mean `minute`"),
        ("60/M", "did you mean `minute`"),
        ("60/year", "366 days"),
        ("60 tokns/minute", "did you mean `tokens`"),
        ("60 input/minute", "input tokens"),
        ("60 bananas/minute", "Allowed: requests"),
        ("60 usd/month", "$50/month"),
        ("$60 tokens/minute", "counts money only"),
        ("60/minute burst $5", "leave the `$` out"),
        ("60/minute bust 5", "unexpected `bust`"),
        ("60/minute/second", "unexpected `/`"),
        ("60/0 minutes", "1 or more"),
        ("60/1.5 minutes", "whole number"),
        ("60/2 months", "number of days"),
        ("60/367 days", "366 days"),
        ("60/999999999999999999 s", "366 days"),
        ("60/9999999999999999999999 s", "whole number"),
        ("1.5/minute", "whole number"),
        ("$0.0000001/day", "six decimals"),
        ("1.2.3/minute", "digits"),
        ("1./minute", "digits"),
        ("./minute", "digits"),
        ("_/minute", "unexpected"),
        ("-5/minute", "positive"),
        ("1,000/day", "1_000"),
        ("99999999999999999999/day", "18 is the most"),
        ("5000000000000000/day", "the most is 4503599627370495"),
        ("999999999999999999G/day", "smaller number"),
        ("minute", "60/minute"),
        ("unlimited/minute", "60/minute"),
        ("unlimited", "alone"),
        ("20 concurrent/minute", "unexpected"),
        ("20 concurrent burst 3", "unexpected"),
        ("10/minute\u{7}", "unexpected"),
        ("10/minute 🦀", "unexpected"),
    ];
    for (text, said) in cases {
        let error = text.parse::<Quota>().expect_err(text).to_string();
        assert!(error.contains(said), "{text}: {error}");
        assert!(!error.contains('\u{7}'));
    }
    let long = "9".repeat(100_000);
    assert!(long.parse::<Quota>().unwrap_err().to_string().len() < 200);
}

#[test]
fn lists() {
    assert_eq!(Quota::parse_all("unlimited"), Ok(vec![]));
    assert_eq!(Quota::parse_all("10/minute; 100/hour"), Ok(vec![quota("10/minute"), quota("100/hour")]));
    for (text, said) in [
        ("10/minute;", "empty"),
        ("10/minute;20/minute", "same unit and window"),
        ("10/minute;unlimited", "alone"),
        ("10/minute;x", "a number is missing"),
    ] {
        let error = Quota::parse_all(text).expect_err(text).to_string();
        assert!(error.contains(said), "{text}: {error}");
    }
    let many: Vec<String> = (1..=17).map(|n| format!("5/{n}m")).collect();
    assert!(Quota::parse_all(&many.join(";")).is_err());
}

/// The compiler's reader and this one: the same quota, or both refuse.
#[test]
fn literals_are_read_alike() {
    use crate::quota::literal;
    let words = [
        "",
        "0",
        "1",
        "60",
        "1_000",
        "1.5",
        "1.",
        ".5",
        "1..2",
        "999999999999999999",
        "9999999999999999999",
        "_1",
        "$",
        "$1.0000001",
        "k",
        "M",
        "G",
        "m",
        "K",
        "requests",
        "Token",
        "tokens",
        "input",
        "output tokens",
        "input_tokens",
        "concurrent",
        "/",
        "per",
        "PER",
        "s",
        "S",
        "minute",
        "Minutes",
        "minutess",
        "d",
        "month",
        "w",
        "week",
        "366 days",
        "367 days",
        "2 month",
        "burst",
        "burst 5",
        "burst $5",
        "x",
        ",",
        "-",
    ];
    let mut state = 7_u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let shapes = [
        "60/minute",
        "1_000 requests per 15 minutes",
        "10k tokens/d burst 5k",
        "$1.5/month",
        "20 concurrent",
        "1.5M input tokens / 2 hours",
        "7/10 s",
        "$10/minute burst $2.5",
        "2G output_tokens/w",
    ];
    let mut accepted = 0;
    for round in 0..60_000 {
        let mut text = String::new();
        if round % 2 == 0 {
            for _ in 0..next(7) {
                text += words[next(words.len())];
                text += if next(2) == 0 { " " } else { "" };
            }
        } else {
            text = shapes[next(shapes.len())].to_string();
            let from = next(text.len());
            let to = from + next(text.len() - from + 1).min(3);
            text.replace_range(from..to, words[next(words.len())]);
        }
        let read = literal::parse(&text);
        accepted += usize::from(read.is_ok());
        assert_eq!(read.ok(), text.parse::<Quota>().ok(), "`{text}`");
    }
    assert!(accepted > 900, "{accepted}");
}

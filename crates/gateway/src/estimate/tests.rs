use bytes::Bytes;
use proptest::prelude::*;

use super::series::Answers;
use super::*;
use crate::call::{Call, Endpoint, Prompt};

fn content(endpoint: Endpoint, members: &str) -> Content {
    let body = format!(r#"{{"model":"m",{members}}}"#);
    Call::from_json(endpoint, Bytes::from(body)).unwrap().content()
}

fn chat(members: &str) -> Content {
    content(Endpoint::ChatCompletions, members)
}

fn text(bytes: usize) -> Content {
    chat(&format!(r#""messages":[{{"role":"user","content":"{}"}}]"#, "x".repeat(bytes)))
}

fn used(prompt: u64, completion: u64) -> Usage {
    Usage { prompt, completion, total: prompt + completion, ..Usage::default() }
}

fn before(estimates: &Estimates, key: &str, content: &Content) -> (u64, u64) {
    let estimate = estimates.before(Some(key), "m", content, None);
    (estimate.input, estimate.output)
}

#[test]
fn before_anything_was_learned() {
    let base64 = "A".repeat(1 << 20);
    let media = format!(
        r#""messages":[{{"role":"user","content":[{{"type":"text","text":"123456"}},
            {{"type":"image_url","image_url":{{"url":"data:image/png;base64,{base64}"}}}},
            {{"type":"image_url","image_url":{{"url":"https://example.com/a.png"}}}},
            {{"type":"input_audio","input_audio":{{"data":"{base64}","format":"wav"}}}},
            {{"type":"file","file":{{"file_data":"data:application/pdf;base64,{base64}"}}}}]}}]"#
    );
    let chat_of = |members| (Endpoint::ChatCompletions, members);
    let hello = r#""messages":[{"role":"user","content":"123456789"}]"#;
    let with = |members: &str| format!("{hello},{members}");
    let bounded = [
        with(r#""max_tokens":7"#),
        with(r#""n":3,"max_completion_tokens":7"#),
        with(r#""max_tokens":99999999999999999999999,"n":2"#),
        with(r#""max_tokens":0"#),
        with(r#""n":3"#),
        with(r#""tools":[{"a":1}]"#),
    ];
    let cases = [
        (chat_of(hello), (3, 512)),
        (chat_of(&bounded[0]), (3, 7)),
        (chat_of(&bounded[1]), (3, 21)),
        (chat_of(&bounded[2]), (3, u64::MAX)),
        (chat_of(&bounded[3]), (3, 512)),
        (chat_of(&bounded[4]), (3, 1_536)),
        (chat_of(&bounded[5]), (6, 512)),
        (chat_of(&media), (2 + 2 * 1_000 + 2 * 1_500, 512)),
        (chat_of(r#""messages":[]"#), (0, 512)),
        ((Endpoint::Completions, r#""prompt":"1234""#), (2, 512)),
        ((Endpoint::Completions, r#""prompt":["123","456"],"max_tokens":5"#), (2, 10)),
        ((Endpoint::Completions, r#""prompt":[1,22,333]"#), (3, 512)),
        ((Endpoint::Completions, r#""prompt":[[1,22],[333]],"n":2,"best_of":4,"max_tokens":5"#), (3, 40)),
        ((Endpoint::Completions, r#""prompt":[],"max_tokens":5"#), (0, 5)),
        ((Endpoint::Completions, r#""prompt":"123","max_completion_tokens":5"#), (1, 512)),
        ((Endpoint::Embeddings, r#""input":["123","456"],"max_tokens":9"#), (2, 0)),
        ((Endpoint::Embeddings, r#""input":[[1,2],[3]]"#), (3, 0)),
        ((Endpoint::Moderations, r#""input":"123""#), (1, 0)),
        ((Endpoint::Rerank, r#""query":"123","documents":["456"]"#), (2, 0)),
        ((Endpoint::ImagesGenerations, r#""prompt":"a cat","n":4"#), (0, 0)),
        ((Endpoint::AudioSpeech, r#""input":"read this""#), (0, 0)),
    ];
    let estimates = Estimates::default();
    for ((endpoint, members), want) in cases {
        let content = content(endpoint, members);
        assert_eq!(before(&estimates, "k", &content), want, "{}", &members[..members.len().min(100)]);
    }
}

#[test]
fn a_recording_of_twenty_megabytes_reserves_nothing_as_a_form_and_little_in_a_chat() {
    let recording = "R".repeat(20 << 20);
    let part = "--XX\r\nContent-Disposition: form-data; name=";
    let form =
        format!("{part}\"model\"\r\n\r\nm\r\n{part}\"file\"; filename=\"a\"\r\n\r\n{recording}\r\n--XX--");
    let kind = "multipart/form-data; boundary=XX";
    let call = Call::from_multipart(Endpoint::AudioTranscriptions, kind, form.into()).unwrap();
    let estimates = Estimates::default();
    assert_eq!(before(&estimates, "k", &call.content()), (0, 0));
    let chat = chat(&format!(r#""messages":[{{"content":[{{"input_audio":{{"data":"{recording}"}}}}]}}]"#));
    assert_eq!(before(&estimates, "k", &chat), (1_500, 512));
}

#[test]
fn absurd_counts_do_not_overflow() {
    let prompt = Prompt {
        text_bytes: u64::MAX,
        token_ids: u64::MAX,
        images: u64::MAX / 4,
        audio: u64::MAX / 4,
        files: u64::MAX / 4,
    };
    let endpoint = Endpoint::ChatCompletions;
    let content = Content { endpoint, prompt, output_max: Some(u64::MAX), answers: u64::MAX };
    let estimates = Estimates::default();
    let estimate = estimates.before(None, "m", &content, None);
    assert_eq!((estimate.input, estimate.output, estimate.total()), (u64::MAX, u64::MAX, u64::MAX));
    estimates.learn(None, "m", &content, &used(u64::MAX / 2, u64::MAX / 2));
}

#[test]
fn the_share_of_tokens_in_text_is_learned_from_above() {
    let estimates = Estimates::default();
    let prompt = text(4_000);
    let mut before_this = before(&estimates, "k", &prompt).0;
    assert_eq!(before_this, 1_334);
    for _ in 0..1_000 {
        estimates.learn(Some("k"), "m", &prompt, &used(1_000, 9));
        let (input, _) = before(&estimates, "k", &prompt);
        assert!((1_000..=1_500).contains(&input), "{input}");
        before_this = input;
    }
    assert!(before_this <= 1_010, "{before_this}");
    assert_eq!(estimates.tokens_of_text("m", 4_000), before_this);
    assert_eq!(estimates.tokens_of_text("another", 4_000), 1_334);

    // What scatters is estimated at its upper end.
    for turn in 0..2_000 {
        estimates.learn(Some("k"), "m", &prompt, &used(800 + 400 * (turn % 2), 9));
    }
    let (input, _) = before(&estimates, "k", &prompt);
    assert!((1_200..1_500).contains(&input), "{input}");
}

#[test]
fn a_short_prompt_teaches_little() {
    let estimates = Estimates::default();
    let hi = text(2);
    for _ in 0..100 {
        estimates.learn(Some("k"), "m", &hi, &used(8, 9)); // four tokens a byte: the chat format
    }
    let (input, _) = before(&estimates, "k", &text(3_000));
    assert!(input < 1_300, "{input}");
}

#[test]
fn images_are_learned_where_they_can_be_told_apart() {
    let estimates = Estimates::default();
    let image = r#"{"image_url":{"url":"https://a"}}"#;
    let images = |text: &str| chat(&format!(r#""messages":[{{"content":["{text}",{image},{image}]}}]"#));
    for _ in 0..1_000 {
        estimates.learn(Some("k"), "m", &images("what is this"), &used(2 * 85 + 4, 9));
        estimates.learn(Some("k"), "m", &images(&"x".repeat(9_000)), &used(4_000, 9)); // mostly text: no one knows
    }
    let (input, _) = before(&estimates, "k", &images(""));
    assert!((170..180).contains(&input), "{input}");
    let with_file = chat(&format!(r#""messages":[{{"content":[{image},{{"file":{{}}}}]}}]"#));
    estimates.learn(Some("k"), "other", &with_file, &used(90_000, 9));
    assert_eq!(estimates.before(None, "other", &with_file, None).input, 2_500);
}

#[test]
fn the_ninety_fifth_percentile_of_late() {
    let mut answers = Answers::new(512);
    for _ in 0..19 {
        answers.add(10);
        assert_eq!(answers.high(), 512);
    }
    answers.add(10);
    assert_eq!(answers.high(), 10);
    for (tokens, want) in [(900, 10), (900, 900), (5, 900)] {
        answers.add(tokens);
        assert_eq!(answers.high(), want);
    }
    let mut answers = Answers::new(512);
    (1..=640).for_each(|tokens| answers.add(tokens));
    assert_eq!(answers.high(), 576 + 61, "of the last 64, 61 are not more");
    let mut answers = Answers::new(512);
    answers.add(u64::MAX);
    assert_eq!(answers.high(), u64::from(u32::MAX));
}

#[test]
fn answers_are_learned_for_each_key_and_model_alone() {
    let estimates = Estimates::default();
    let (open, two) = (text(30), chat(r#""messages":[],"n":2"#));
    for _ in 0..30 {
        estimates.learn(Some("short"), "m", &open, &used(10, 20));
        estimates.learn(Some("long"), "m", &two, &used(10, 60_000));
        estimates.learn(None, "m", &open, &used(10, 1));
    }
    assert_eq!(before(&estimates, "short", &open).1, 20);
    assert_eq!(before(&estimates, "long", &open).1, 30_000);
    assert_eq!(before(&estimates, "long", &two).1, 60_000);
    assert_eq!(before(&estimates, "new", &open).1, 512);
    assert_eq!(estimates.before(None, "m", &open, None).output, 1);
    assert_eq!(estimates.before(Some("short"), "another", &open, None).output, 512);
}

#[test]
fn a_bounded_answer_teaches_nothing_about_unbounded_ones() {
    let estimates = Estimates::default();
    let bounded = chat(r#""messages":[],"max_tokens":1"#);
    for _ in 0..100 {
        estimates.learn(Some("k"), "m", &bounded, &used(10, 1));
        estimates.learn(Some("k"), "m", &text(3), &used(10, 0)); // a provider that does not say
    }
    assert_eq!(before(&estimates, "k", &text(3)).1, 512);
}

#[test]
fn a_key_that_asks_often_teaches_no_more_than_another() {
    let estimates = Estimates::default();
    let prompt = text(4_000);
    let mut highest = 0;
    for _ in 0..500 {
        for _ in 0..50 {
            estimates.learn(Some("loud"), "m", &prompt, &used(8_000, 9));
        }
        for key in ["a", "b", "c", "d", "e", "f", "g"] {
            estimates.learn(Some(key), "m", &prompt, &used(1_000, 9));
        }
        highest = highest.max(
            estimates.models.get(estimates.hasher.hash_one("m"), |m| (m.text.mean() * 1e3) as u64).unwrap(),
        );
    }
    // By requests, seven in eight are the loud one's: a mean of 1.78.
    assert!(highest < 1_600, "{highest}");
}

#[test]
fn what_was_counted_is_not_estimated() {
    let estimates = Estimates::default();
    let counted = |whole| Some(Counted { tokens: 77, whole });
    let prompt = text(9_000);
    let estimate = estimates.before(None, "m", &prompt, counted(true));
    assert_eq!((estimate.input, estimate.input_exact), (77, true));
    assert!(!estimates.before(None, "m", &prompt, counted(false)).input_exact);
    assert!(!estimates.before(None, "m", &prompt, None).input_exact);
    let image = chat(r#""messages":[{"content":[{"image_url":"https://a"}]}]"#);
    let estimate = estimates.before(None, "m", &image, counted(true));
    assert_eq!((estimate.input, estimate.input_exact), (1_077, false));
    let ids = content(Endpoint::Embeddings, r#""input":[1,2,3]"#);
    assert!(estimates.before(None, "m", &ids, None).input_exact, "ids are what is counted");
}

#[test]
fn the_error_of_an_estimate() {
    let estimate =
        |input, output, output_bounded| Estimate { input, output, output_bounded, input_exact: false };
    let cases = [
        (estimate(100, 500, false), used(100, 200), Some(2.0)),
        (estimate(100, 500, true), used(200, 1), Some(0.5)),
        (estimate(0, 0, false), used(9, 9), None),
        (estimate(9, 9, false), used(0, 0), None),
        (estimate(u64::MAX, u64::MAX, false), used(1, 0), Some(u64::MAX as f64)),
    ];
    for (estimate, used, want) in cases {
        assert_eq!(estimate.error_ratio(&used), want, "{estimate:?} {used:?}");
    }
}

#[test]
fn memory_is_bounded_and_what_is_in_use_stays() {
    let estimates = Estimates::new(16, 800);
    let open = text(30);
    for turn in 0..20_000 {
        let key = turn.to_string();
        estimates.learn(Some(&key), "m", &open, &used(10, 700));
        estimates.learn(Some("k"), &format!("model-{turn}"), &open, &used(10, 20));
        estimates.learn(Some("busy"), "m", &open, &used(10, 20));
    }
    assert!(estimates.keys.len() <= 800 && estimates.models.len() <= 16);
    assert_eq!(before(&estimates, "busy", &open).1, 20);
    assert_eq!(
        before(&estimates, "never seen", &open).1,
        700,
        "as keys of this model were that are forgotten"
    );
}

#[test]
fn many_threads_learn_at_once() {
    let estimates = Estimates::new(8, 8);
    let open = text(300);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (estimates, open) = (&estimates, &open);
            scope.spawn(move || {
                for turn in 0..2_000 {
                    let (key, model) = ((turn * thread % 13).to_string(), (turn % 11).to_string());
                    estimates.learn(Some(&key), &model, open, &used(100, 100));
                    estimates.before(Some(&key), &model, open, None);
                }
            });
        }
    });
    assert!(estimates.keys.len() <= 8 && estimates.models.len() <= 8);
}

proptest! {
    #[test]
    fn the_percentile_is_that_of_the_last_64(seen in prop::collection::vec(0u64..20, 64..200)) {
        let mut answers = Answers::new(512);
        for (index, tokens) in seen.iter().enumerate() {
            answers.add(*tokens);
            if index >= 63 {
                let mut last = seen[index - 63..=index].to_vec();
                last.sort_unstable();
                prop_assert_eq!(answers.high(), last[60]);
            }
        }
    }

    #[test]
    fn whatever_is_learned_stays_within_bounds(
        taught in prop::collection::vec((0u64..1 << 41, 0u64..1 << 41, 0u64..5, 0u64..1 << 30), 1..200),
        keys in 1usize..20,
    ) {
        let estimates = Estimates::default();
        for (turn, (prompt, completion, images, text_bytes)) in taught.into_iter().enumerate() {
            let content = Content {
                endpoint: Endpoint::ChatCompletions,
                prompt: Prompt { text_bytes, images, ..Prompt::default() },
                output_max: None,
                answers: 1,
            };
            estimates.learn(Some(&(turn % keys).to_string()), "m", &content, &used(prompt, completion));
        }
        let (input, output) = before(&estimates, "unknown", &text(16_000));
        prop_assert!((1_000..=32_000).contains(&input), "{}", input);
        prop_assert_eq!(output, 512);
        let image = chat(r#""messages":[{"content":[{"image_url":"https://a"}]}]"#);
        let (input, _) = before(&estimates, "unknown", &image);
        prop_assert!((64..=65_536).contains(&input), "{}", input);
    }
}

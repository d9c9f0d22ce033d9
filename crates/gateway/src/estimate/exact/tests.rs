use bytes::Bytes;

use super::*;

/// One token a byte.
struct Octets;

impl Tokenizer for Octets {
    fn count(&self, text: &str) -> usize {
        text.len()
    }
}

fn call(endpoint: Endpoint, members: &str) -> Call {
    Call::from_json(endpoint, Bytes::from(format!(r#"{{"model":"m",{members}}}"#))).unwrap()
}

fn octets() -> Tokenizers {
    let threads = Arc::new(Semaphore::new(1));
    Tokenizers { cl100k: None, o200k: Some(Arc::new(Octets)), threads }
}

#[test]
fn models_have_the_vocabulary_of_their_generation() {
    use Vocabulary::{Cl100k, O200k};
    for (model, want) in [
        ("gpt-4o-mini-2024-07-18", (O200k, true)),
        ("gpt-4.1", (O200k, true)),
        ("gpt-5-nano", (O200k, true)),
        ("o1", (O200k, true)),
        ("o3-mini", (O200k, true)),
        ("openai/gpt-4o", (O200k, true)),
        ("ft:gpt-4o:org::1", (O200k, true)),
        ("gpt-4", (Cl100k, true)),
        ("gpt-4-turbo", (Cl100k, true)),
        ("gpt-3.5-turbo", (Cl100k, true)),
        ("text-embedding-3-small", (Cl100k, true)),
        ("llama-3.3-70b", (O200k, false)),
        ("", (O200k, false)),
    ] {
        assert_eq!(vocabulary_of(model), want, "{model}");
    }
}

#[test]
fn only_what_is_needed_is_loaded_and_only_once() {
    let none = Tokenizers::load([], None);
    assert!(none.cl100k.is_none() && none.o200k.is_none());
    let small = Tokenizers::load(["gpt-4", "gpt-3.5-turbo"], Some(&none));
    assert!(small.cl100k.is_some() && small.o200k.is_none());
    let next = Tokenizers::load(["gpt-4"], Some(&small));
    assert!(Arc::ptr_eq(next.cl100k.as_ref().unwrap(), small.cl100k.as_ref().unwrap()));
    assert!(Tokenizers::load([], Some(&next)).cl100k.is_none(), "what nobody needs is given back");
}

#[tokio::test]
async fn counts_are_those_of_the_model() {
    let tokenizers = Tokenizers::load(["gpt-4o", "gpt-4"], None);
    let hello = r#""messages":[{"role":"user","content":"hello world"}]"#;
    let named = r#""messages":[{"role":"system","content":"hello world","name":"bob"},{"role":"user","content":[{"type":"text","text":"hello world"}]}]"#;
    let escaped = r#""messages":[{"role":"user","content":"hello\u0020w\u006frld"}]"#;
    let tools = r#""messages":[{"role":"user","content":"hello world"}],"tools":[]"#;
    let calls = r#""messages":[{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]"#;
    let image =
        r#""messages":[{"role":"user","content":[{"image_url":{"url":"data:image/png;base64,AAAA"}}]}]"#;
    let chat = Endpoint::ChatCompletions;
    for (model, endpoint, members, tokens, whole) in [
        ("gpt-4o", chat, hello, 2 + 4 + 3, true),
        ("gpt-4", chat, hello, 2 + 4 + 3, true),
        ("gpt-4o", chat, escaped, 2 + 4 + 3, true),
        ("gpt-4o", chat, named, 2 + 2 + 1 + 1 + 2 * 4 + 3, true),
        ("llama", chat, hello, 2 + 4 + 3, false),
        ("gpt-4o", chat, tools, 1 + 2 + 4 + 3, false),
        ("gpt-4o", chat, calls, 1 + 1 + 1 + 4 + 3, false),
        ("gpt-4o", chat, image, 4 + 3, true),
        ("gpt-4o", Endpoint::Completions, r#""prompt":["hello world","hello"]"#, 3, true),
        ("gpt-4o", Endpoint::Completions, r#""prompt":[1,2,3]"#, 0, true),
        ("gpt-4o", Endpoint::Completions, r#""prompt":"<|endoftext|>","suffix":"hello""#, 8, false),
        ("gpt-4", Endpoint::Embeddings, r#""input":"你好世界""#, 5, true),
        ("gpt-4o", Endpoint::Embeddings, r#""input":"你好世界""#, 2, true),
    ] {
        let counted = tokenizers.count(model, &call(endpoint, members)).await;
        assert_eq!(counted, Some(Counted { tokens, whole }), "{model} {members}");
    }
}

#[tokio::test]
async fn what_cannot_be_counted_is_left_to_the_estimate() {
    let tokenizers = octets();
    let prompt =
        |bytes: u64| call(Endpoint::Completions, &format!(r#""prompt":"{}""#, "x".repeat(bytes as usize)));
    let longest = tokenizers.count("o1", &prompt(COUNTED_BYTES_MAX)).await;
    assert_eq!(longest, Some(Counted { tokens: COUNTED_BYTES_MAX, whole: true }));
    assert_eq!(tokenizers.count("o1", &prompt(COUNTED_BYTES_MAX + 1)).await, None);
    assert_eq!(tokenizers.count("gpt-4", &prompt(1)).await, None, "its tokenizer was not loaded");
    let speech = call(Endpoint::AudioSpeech, r#""input":"hello""#);
    assert_eq!(tokenizers.count("o1", &speech).await, None, "it reserves no tokens");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_long_for_a_thread() {
    let tokenizers = octets();
    let busy = tokenizers.threads.clone().acquire_owned().await.unwrap();
    let prompt = call(Endpoint::Completions, r#""prompt":"x""#);
    assert_eq!(tokenizers.count("o1", &prompt).await, None);
    drop(busy);
    assert!(tokenizers.count("o1", &prompt).await.is_some());
    assert_eq!(tokenizers.threads.available_permits(), 1);
}

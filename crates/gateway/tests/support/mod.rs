//! What the black-box tests are made of: a gateway process, a scripted provider, a client that speaks bytes.
//!
//! Nothing here sleeps to wait for something: log lines, closed sockets, gates and metrics say when it has happened, and
//! every wait has a deadline that fails the test.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code, unused_imports, missing_docs, unreachable_pub)]

mod callers;
mod client;
mod fleet;
mod governed;
mod listener;
mod provider;
mod proxy;
mod redis;
mod tollgate;

use std::time::Duration;

pub use callers::{Answer, Callers, Doors, Window, users_config, windows};
pub use client::{Conn, Response, chat, get, over_http2, post, request};
pub use fleet::{CHAT, Fleet, tokens_of};
pub use governed::{Ask, Store, governed, obedient, start_counting, start_governed};
pub use listener::Listener;
pub use provider::{Gate, Provider, Seen, Step, blackhole, chunk, json_answer, refusing, sse};
pub use proxy::Proxy;
pub use redis::Redis;
pub use tollgate::{Metrics, Tollgate};

/// Longest wait for something that should happen at once.
pub const SOON: Duration = Duration::from_secs(20);

/// Waits for something that should happen at once.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(SOON, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {SOON:?}"),
    }
}

/// One user, one model `chat` with these providers (YAML mappings in braces, without the braces).
pub fn chat_config(providers: &[String]) -> String {
    let providers: String = providers.iter().map(|provider| format!("      - {{ {provider} }}\n")).collect();
    format!(
        "users:\n  - name: alice\n    keys: [sk-alice]\nmodels:\n  - name: chat\n    aliases: [gpt-4o-mini]\n    providers:\n{providers}"
    )
}

/// A provider's line for [`chat_config`].
pub fn openai(provider: &Provider) -> String {
    format!("type: openai, url: 'http://{}', key: sk-upstream", provider.address)
}

/// A chat request's body.
pub fn question(stream: bool) -> String {
    format!(r#"{{"model":"chat","stream":{stream},"messages":[{{"role":"user","content":"Hello"}}]}}"#)
}

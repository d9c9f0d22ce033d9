//! Connections to providers: kept, given up, never a request lost to a dead one.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{Gate, Provider, Step, Tollgate, chat, chat_config, json_answer, openai, post, question, soon};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;

/// More than one event loop looks at in one turn, for each of a few workers.
const BURST: usize = 600;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_idle_connections_that_the_provider_closed_costs_no_request() {
    let (together, bye) = (Gate::new(), Gate::new());
    let script = {
        let (together, bye, count) = (together.clone(), bye.clone(), AtomicUsize::new(0));
        move |_: &support::Seen| {
            let answer = Step::Send(json_answer("200 OK", "", ANSWER));
            if count.fetch_add(1, Ordering::Relaxed) < BURST {
                vec![Step::Wait(together.clone()), answer, Step::Wait(bye.clone()), Step::Close]
            } else {
                vec![answer]
            }
        }
    };
    let provider = Provider::start(script).await;
    let gateway = Arc::new(Tollgate::start(&chat_config(&[openai(&provider) + ", timeout: 15s"])).await);
    let data = gateway.data;
    let burst: Vec<_> = (0..BURST)
        .map(|_| tokio::spawn(async move { post(data, &chat(&question(false))).await.status }))
        .collect();
    together.reached(BURST).await;
    together.open();
    for answered in burst {
        assert_eq!(soon("an answer", answered).await.expect("no panic"), 200);
    }
    bye.open();
    provider.connections_become(|open| open == 0).await;
    // Connections are dealt to the workers in turn, so that each of a few gets one.
    for number in 0..8 {
        assert_eq!(post(data, &chat(&question(false))).await.status, 200, "request {number} after the burst");
    }
    assert_eq!(provider.hits(), BURST + 8, "nothing was sent twice");
}

#[tokio::test]
async fn a_connection_is_used_again_also_after_a_refusal() {
    let script = {
        let count = AtomicUsize::new(0);
        move |_: &support::Seen| {
            let status =
                if count.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { "500 Oops" } else { "200 OK" };
            vec![Step::Send(json_answer(status, "", ANSWER))]
        }
    };
    let provider = Provider::start(script).await;
    let gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let mut caller = support::Conn::open(gateway.data).await;
    for expected in [502, 200, 502, 200] {
        caller.send(&chat(&question(false))).await;
        assert_eq!(caller.response().await.status, expected);
    }
    provider.connections_become(|open| open == 1).await;
    assert_eq!(provider.opened(), 1, "one caller's connection, one connection to the provider");
}

//! Calls in flight, while Redis comes and goes.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::time::Instant;

use support::resilient::{PATIENCE, ask, count, fleet, shared, until};
use support::server::Server;
use support::{denied, granted, slots};
use tollgate_limiter::{Millis, Retry, Source};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_flight_stay_counted() {
    let server = Server::start();
    let stores = fleet(&server.url(), 3).await;
    let limit = slots("r", 6);
    let mut held = vec![granted(ask(&stores[0], &limit, 1).await), granted(ask(&stores[0], &limit, 1).await)];
    held.push(granted(ask(&stores[1], &limit, 1).await));
    // One that is over before.
    granted(ask(&stores[2], &limit, 1).await).settled(&[0]).await.unwrap();
    server.signal("STOP");
    until("nobody asks", || stores.iter().all(|store| store.state().is_open())).await;
    for (store, more) in stores.iter().zip([0, 1, 2]) {
        for _ in 0..more {
            held.push(granted(ask(store, &limit, 1).await));
        }
        let denial = denied(ask(store, &limit, 1).await);
        assert_eq!((denial.source(), denial.binding().limit.capacity()), (Source::Share, 2));
    }
    // One of those from before is over: it makes room here, and there when it can be told.
    held.remove(0).settle(&[0]);
    held.push(granted(ask(&stores[0], &limit, 1).await));
    server.signal("CONT");
    shared(&stores).await;
    let start = Instant::now();
    while count(&server, &limit).await != 6 {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
    for store in &stores {
        let denial = denied(ask(store, &limit, 1).await);
        assert_eq!((denial.source(), denial.retry()), (Source::Redis, Retry::After(Millis(1_000))));
    }
    for held in held {
        held.renew();
        held.settle(&[0]);
    }
    while count(&server, &limit).await != 0 {
        assert!(start.elapsed() < PATIENCE, "{}", count(&server, &limit).await);
    }
}

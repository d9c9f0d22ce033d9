//! A cluster of which a part does not answer: what is there is decided by that part's absence, the rest stays exact.
#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use support::fleet::{Instance, addresses, cluster};
use support::resilient::{PATIENCE, until};
use support::{charge, limit};
use tollgate_limiter::{
    Algorithm, Circuit, Decision, Limit, RedisOptions, RedisStore, ResilientOptions, ResilientStore, Source,
    Store, WhenDown,
};

const N: u64 = 3;
const L: u64 = 60;

async fn stores(nodes: &[Instance]) -> Vec<ResilientStore> {
    let url = format!("redis+cluster://{}", addresses(&nodes[..3]));
    let open = || RedisStore::open(RedisOptions::new(&url).deadline(Duration::from_millis(200))).unwrap();
    let stores: Vec<_> = (0..N).map(|_| ResilientStore::new(open(), ResilientOptions::default())).collect();
    for store in &stores {
        until("all are known", || {
            store.instances().count == N as u32
                && store.state() == Circuit::Closed
                && store.redis().status().connected
        })
        .await;
    }
    stores
}

/// A name whose counters are on this master, of the three that divide the slots evenly.
async fn name_on(nodes: &[Instance], master: usize) -> String {
    for number in 0..100 {
        let slot: usize = nodes[0].ask(&format!("CLUSTER KEYSLOT user{number}")).await;
        if slot * 3 / 16_384 == master {
            return format!("user{number}");
        }
    }
    panic!("no name is on master {master}");
}

async fn ask(store: &ResilientStore, limit: &Arc<Limit>, name: &str) -> Decision {
    store.reserve(charge(limit, name, 1)).await.unwrap()
}

async fn exhaust(stores: &[ResilientStore], limit: &Arc<Limit>, name: &str) -> u64 {
    let (mut admitted, mut refused) = (0, 0);
    while refused < stores.len() {
        refused = 0;
        for store in stores {
            match ask(store, limit, name).await {
                Decision::Granted(_) => admitted += 1,
                Decision::Denied(_) => refused += 1,
            }
        }
    }
    admitted
}

/// Until every store is answered by Redis about this name.
async fn shared(stores: &[ResilientStore], limit: &Arc<Limit>, name: &str) {
    let start = Instant::now();
    for store in stores {
        while store.reserve(charge(limit, name, 0)).await.unwrap().source() != Source::Redis {
            assert!(start.elapsed() < PATIENCE, "never: {:?}", store.redis().status());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_master_of_three_is_frozen() {
    let nodes = cluster(false).await;
    for node in &nodes {
        node.ask::<()>("CONFIG SET cluster-require-full-coverage no").await;
    }
    // The one that hears the heartbeats.
    let slot: usize = nodes[0].ask("CLUSTER KEYSLOT tollgate:ctl:instances").await;
    let frozen = slot * 3 / 16_384;
    let (there, gone) = (name_on(&nodes, (frozen + 1) % 3).await, name_on(&nodes, frozen).await);
    let stores = stores(&nodes).await;
    let limit = limit("r", "60/day", Algorithm::FixedWindow);
    let closed = Arc::new(
        support::limit("closed", "60/day", Algorithm::FixedWindow)
            .as_ref()
            .clone()
            .when_down(WhenDown::Closed),
    );
    let (mut admitted, mut exact) = (0, 0);
    for store in &stores {
        for _ in 0..5 {
            admitted += u64::from(ask(store, &limit, &gone).await.is_granted());
        }
    }
    for store in &stores {
        assert_eq!(store.reserve(charge(&limit, &gone, 0)).await.unwrap().source(), Source::Redis);
    }
    nodes[frozen].signal("STOP");
    for store in &stores {
        while ask(store, &limit, &gone).await.source() != Source::Share {
            admitted += 1;
        }
        admitted += 1;
        // Three questions without an answer, then none is asked.
        for _ in 0..3 {
            assert!(ask(store, &limit, &gone).await.is_granted());
            admitted += 1;
        }
        let asked = Instant::now();
        assert_eq!(ask(store, &limit, &gone).await.source(), Source::Share);
        admitted += 1;
        assert!(asked.elapsed() < Duration::from_millis(150), "{:?}", asked.elapsed());
        assert!(store.reserve(charge(&closed, &gone, 1)).await.is_err());
    }
    // Longer than any heartbeat or probe: the others stay exact, all the time.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(2_500) {
        for store in &stores {
            let decision = ask(store, &limit, &there).await;
            assert!(
                matches!(decision.source(), Source::Redis | Source::DenialMemory),
                "{decision:?} {:?}",
                store.state()
            );
            exact += u64::from(decision.is_granted());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(exact, L);
    admitted += exhaust(&stores, &limit, &gone).await;
    assert!((L..=L + N).contains(&admitted), "{admitted}");
    for store in &stores {
        assert_eq!((store.state(), store.counts().opened), (Circuit::Closed, 0));
    }
    let held = stores[0].reserve(charge(&limit, &there, 0)).await.unwrap();
    drop(held);
    nodes[frozen].signal("CONT");
    shared(&stores, &limit, &gone).await;
    let start = Instant::now();
    let used = async || {
        let peeked = stores[0].redis().peek(charge(&limit, &gone, 0)).await;
        peeked.map_or(0, |standings| standings[0].used)
    };
    while used().await < admitted.min(L) {
        assert!(start.elapsed() < PATIENCE, "{} of {admitted}", used().await);
    }
    admitted += exhaust(&stores, &limit, &gone).await;
    assert!(admitted <= L + N, "{admitted}");
}

async fn until_acknowledged(store: &RedisStore, limit: &Arc<Limit>, name: &str) {
    let start = Instant::now();
    while support::granted(store.reserve(charge(limit, name, 1)).await.unwrap()).is_unreplicated() {
        assert!(start.elapsed() < PATIENCE);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_master_s_counters_are_shared_again() {
    let mut nodes = cluster(true).await;
    let (there, gone) = (name_on(&nodes, 0).await, name_on(&nodes, 1).await);
    let stores = stores(&nodes).await;
    let limit = limit("r", "60/day", Algorithm::MovingWindow);
    let mut admitted = 0;
    for store in &stores {
        for _ in 0..5 {
            admitted += u64::from(ask(store, &limit, &gone).await.is_granted());
        }
        drop(ask(store, &limit, &there).await);
    }
    for store in &stores {
        drop(store.reserve(charge(&limit, &gone, 0)).await.unwrap());
    }
    // In a cluster, too, a grant can wait for a replica.
    let safe = limit.as_ref().clone().replicated();
    let redis = stores[0].redis();
    until_acknowledged(redis, &Arc::new(safe), &there).await;
    nodes[1].kill();
    for store in &stores {
        for _ in 0..4 {
            admitted += u64::from(ask(store, &limit, &gone).await.is_granted());
        }
    }
    shared(&stores, &limit, &gone).await;
    shared(&stores, &limit, &there).await;
    let start = Instant::now();
    while stores.iter().any(|store| store.counts().charged_late == 0 && store.counts().share > 0) {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    admitted += exhaust(&stores, &limit, &gone).await;
    assert!((L - 3..=L + N).contains(&admitted), "{admitted}");
}

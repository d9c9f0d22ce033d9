//! Definition, memory and Redis say the same, whatever happens.
#![cfg(feature = "redis")]

mod support;

use support::agreement::{FUTURE, History};
use support::server::Server;
use tollgate_limiter::{ManualClock, Millis};

const HISTORIES: u64 = 12;
const STEPS: u64 = 10_000;

#[tokio::test]
async fn definition_memory_and_redis_agree() {
    let server = Server::start();
    let (mut grants, mut denials, mut settlements, mut renewals, mut together) = (0, 0, 0, 0, 0);
    for seed in 0..HISTORIES {
        let clock = ManualClock::at(Millis(FUTURE));
        let options = server.options().prefix(&format!("seed{seed}")).without_denial_memory();
        let store = server.store(options.rehearse(clock.clone(), &[])).await;
        let mut history = History::new(seed, clock, store);
        if let Err(difference) = history.tell(STEPS).await {
            panic!("seed {seed}: {difference}");
        }
        grants += history.grants;
        denials += history.denials;
        settlements += history.settlements;
        renewals += history.renewals;
        together += history.together;
    }
    println!(
        "{grants} granted, {denials} denied, {settlements} settled, {renewals} renewed, {together} together"
    );
    assert!(grants > 20_000 && denials > 20_000 && settlements > 10_000);
    assert!(renewals > 3_000 && together > 3_000);
}

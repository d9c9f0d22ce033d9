//! Without any framework: take an estimate of several limits at once, work, and settle.

use std::{borrow::Cow, error::Error, sync::Arc};

use tollgate_limiter::{
    Algorithm, Charge, Decision, Dimension, Limit, MemoryStore, Scope, SystemClock, limit,
};

pub(crate) fn run() -> Result<Vec<String>, Box<dyn Error>> {
    let store = MemoryStore::new(SystemClock);
    let per_user = Scope::of([Dimension::User]);
    let requests = Arc::new(Limit::new("free", limit!("3/day"), Algorithm::FixedWindow, per_user)?);
    let tokens = Arc::new(Limit::new("free", limit!("1k tokens/day"), Algorithm::FixedWindow, per_user)?);
    let alice = per_user.subject(|_| Cow::Borrowed("alice"));
    let mut said = Vec::new();
    for used in [400, 250, 90, 10] {
        let request = Charge::new(Arc::clone(&requests), alice.clone(), 1);
        let estimate = Charge::estimate(Arc::clone(&tokens), alice.clone(), 300);
        match store.reserve(vec![request, estimate]) {
            Decision::Granted(reservation) => {
                reservation.settle(&[1, used]);
                let left = store.peek(vec![Charge::new(Arc::clone(&tokens), alice.clone(), 0)]);
                said.push(format!("used {used}, {} left", left[0].remaining));
            }
            Decision::Denied(denial) => said.push(format!("refused by {}", denial.binding().limit.id())),
        }
    }
    Ok(said)
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("{}", run()?.join("\n"));
    Ok(())
}

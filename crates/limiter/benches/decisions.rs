//! Time per decision: `cargo bench -p tollgate-limiter --bench decisions`.

mod loads;

use criterion::{Criterion, criterion_group, criterion_main};
use loads::Load;
use tollgate_limiter::Algorithm;

fn decisions(criterion: &mut Criterion) {
    let mut turn = 0;
    let mut next = move || {
        turn += 7;
        turn
    };
    let load = Load::new(None);
    criterion.bench_function("governor, one limit", |bencher| bencher.iter(|| load.governor(next())));
    for limits in [1, 2, 4] {
        let name = format!("take, {limits} limits");
        criterion.bench_function(&name, |bencher| bencher.iter(|| load.tollgate_take(next(), limits)));
        let name = format!("reserve, {limits} limits");
        criterion.bench_function(&name, |bencher| bencher.iter(|| load.tollgate_reserve(next(), limits)));
        let name = format!("reserve and settle, {limits} limits");
        criterion.bench_function(&name, |bencher| bencher.iter(|| load.tollgate_settle(next(), limits)));
    }
    for algorithm in Algorithm::ALL {
        let load = Load::new(Some(algorithm));
        let name = format!("take, one {algorithm}");
        criterion.bench_function(&name, |bencher| bencher.iter(|| load.tollgate_take(next(), 1)));
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);

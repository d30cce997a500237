//! How long operations take: `scripts/bench core`.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use operations::{OPERATIONS, Proxy};

fn operations(criterion: &mut Criterion) {
    let mut proxy = Proxy::default();
    for operation in &OPERATIONS {
        criterion.bench_function(operation.name, |bencher| bencher.iter(|| (operation.run)(&mut proxy)));
    }
}

criterion_group! {
    name = time;
    // So that all of it takes about a minute.
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).sample_size(50);
    targets = operations
}
criterion_main!(time);

//! What the plugins of a process share where they are no VMs, in place of Envoy's shared data: values by name, with
//! compare-and-swap.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ahash::RandomState;

use keygate_core::shm::{Conflict, SharedData};

/// One such store.
#[derive(Default)]
pub struct Store {
    values: Mutex<Values>,
}

#[derive(Default)]
struct Values {
    by_key: HashMap<String, (Arc<[u8]>, u32), RandomState>,
    /// How often a value was written.
    writes: u32,
}

static STORES: Mutex<Vec<(String, Weak<Store>)>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can stop half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// The one of that name, made if nobody has it. It ends with the last who does: a configuration that replaces
    /// another finds what that one had.
    pub fn of(name: &str) -> Arc<Self> {
        let mut stores = lock(&STORES);
        stores.retain(|(_, store)| store.strong_count() > 0);
        let known = stores.iter().find(|(known, _)| known == name).and_then(|(_, store)| store.upgrade());
        known.unwrap_or_else(|| {
            let store = Arc::new(Self::default());
            stores.push((name.to_owned(), Arc::downgrade(&store)));
            store
        })
    }
}

impl SharedData for &Store {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        let (value, cas) = lock(&self.values).by_key.get(key).cloned()?;
        Some((value.to_vec(), cas))
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        let value = Arc::from(value);
        let mut values = lock(&self.values);
        let have = values.by_key.get(key).map(|(_, have)| *have);
        if cas.zip(have).is_some_and(|(cas, have)| cas != have) {
            return Err(Conflict);
        }
        // Never 0, and never the number that no value has.
        values.writes = values.writes.checked_add(1).filter(|writes| *writes < u32::MAX).unwrap_or(1);
        let entry = (value, values.writes);
        // The old value is freed after the lock is.
        let _old = match values.by_key.get_mut(key) {
            Some(place) => Some(std::mem::replace(place, entry)),
            None => values.by_key.insert(key.to_owned(), entry),
        };
        drop(values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_value_is_written_by_whoever_saw_it_last() {
        let store = Store::default();
        let mut data = &store;
        assert_eq!(data.get("a"), None);
        // With whatever number, where there is none.
        data.set("a", b"1", Some(u32::MAX)).unwrap();
        let (value, first) = data.get("a").unwrap();
        assert_eq!((value.as_slice(), first > 0), (&b"1"[..], true));
        assert_eq!(data.set("a", b"2", Some(u32::MAX)), Err(Conflict));
        data.set("a", b"2", Some(first)).unwrap();
        assert_eq!(data.set("a", b"3", Some(first)), Err(Conflict));
        data.set("a", b"4", None).unwrap();
        assert_eq!(data.get("a").unwrap().0, b"4");
        assert_eq!(data.get("b"), None);
    }

    #[test]
    fn numbers_go_round_without_the_two_that_mean_something_else() {
        let store = Store::default();
        lock(&store.values).writes = u32::MAX - 2;
        let mut data = &store;
        let numbers = [(); 3].map(|()| {
            data.set("a", b"", None).unwrap();
            data.get("a").unwrap().1
        });
        assert_eq!(numbers, [u32::MAX - 1, 1, 2]);
    }

    #[test]
    fn nothing_that_many_count_at_once_is_lost() {
        const EACH: u64 = 2_000;
        let store = Store::default();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut data = &store;
                    for _ in 0..EACH {
                        while {
                            let (count, cas) = data.get("count").map_or((0, u32::MAX), |(value, cas)| {
                                (u64::from_le_bytes(value.try_into().unwrap()), cas)
                            });
                            data.set("count", &(count + 1).to_le_bytes(), Some(cas)).is_err()
                        } {}
                    }
                });
            }
        });
        assert_eq!((&store).get("count").unwrap().0, (4 * EACH).to_le_bytes());
    }

    #[test]
    fn a_store_ends_with_the_last_that_has_it() {
        let (first, second, other) = (Store::of("a name"), Store::of("a name"), Store::of("another"));
        (&*first).set("a", b"1", None).unwrap();
        assert_eq!((&*second).get("a").unwrap().0, b"1");
        assert_eq!((&*other).get("a"), None);
        drop(first);
        let third = Store::of("a name");
        assert_eq!((&*third).get("a").unwrap().0, b"1");
        drop((second, third));
        assert_eq!((&*Store::of("a name")).get("a"), None);
    }
}

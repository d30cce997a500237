//! The requests of each key that are not answered yet. A key has a bounded number of them, so that one key cannot
//! crowd out all others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{StatusCode, header};

use crate::http::problem::Problem;

/// The most requests of a key at a time.
const MAX_OF_KEY: usize = 256;

/// Requests that are not answered, by the id of their key.
#[derive(Debug, Default)]
pub struct InFlight(Mutex<HashMap<String, usize>>);

impl InFlight {
    /// Takes in a request of a key.
    ///
    /// # Errors
    /// 429 when the key has too many already.
    pub fn enter(self: &Arc<Self>, key_id: &str) -> Result<Permit, Problem> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key_id.to_owned()).or_insert(0);
        if *count >= MAX_OF_KEY {
            let detail = format!("This key has {MAX_OF_KEY} requests that are not answered yet.");
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail)
                .with_header(header::RETRY_AFTER, "1"));
        }
        *count += 1;
        Ok(Permit { key_id: key_id.to_owned(), in_flight: Arc::clone(self) })
    }
}

/// A request that is not answered yet.
#[derive(Debug)]
pub struct Permit {
    key_id: String,
    in_flight: Arc<InFlight>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.in_flight.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key_id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_bounded_number_and_others_are_not_concerned() {
        let in_flight = Arc::new(InFlight::default());
        let mut permits: Vec<_> = (0..MAX_OF_KEY).map(|_| in_flight.enter("key_1").unwrap()).collect();
        assert!(in_flight.enter("key_1").is_err());
        let other = in_flight.enter("key_2").unwrap();
        drop(permits.pop());
        permits.push(in_flight.enter("key_1").unwrap());
        drop((permits, other));
        assert!(in_flight.0.lock().unwrap().is_empty());
    }
}

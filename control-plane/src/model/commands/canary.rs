//! Definitions of canary tests.

use super::Plan;
use crate::model::View;
use crate::model::canary;
use crate::model::canary::MAX_TESTS;
use crate::model::canary::Test;
use crate::model::change::Change;

/// A definition is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TestError {
    /// There are too many.
    #[error("There are {MAX_TESTS} canary tests already; remove some.")]
    TooMany,
    /// There is none with this id.
    #[error("There is no canary test with this id.")]
    Unknown,
}

/// Adds a test or replaces the one with its id. Seeds ask `app_endpoint`.
///
/// # Errors
/// When there are too many.
pub fn put(view: &View<'_>, app_endpoint: &str, test: Test) -> Plan<(), TestError> {
    let tests = canary::defined(app_endpoint, view.model.canary_tests());
    if tests.len() >= MAX_TESTS && tests.iter().all(|other| other.id != test.id) {
        return Err(TestError::TooMany);
    }
    Ok((vec![Change::CanaryTestPut { test: Box::new(test) }], ()))
}

/// Removes a test.
///
/// # Errors
/// When there is none with this id.
pub fn remove(view: &View<'_>, app_endpoint: &str, id: &str) -> Plan<(), TestError> {
    if canary::defined(app_endpoint, view.model.canary_tests()).iter().all(|test| test.id != id) {
        return Err(TestError::Unknown);
    }
    Ok((vec![Change::CanaryTestDeleted { id: id.to_owned() }], ()))
}

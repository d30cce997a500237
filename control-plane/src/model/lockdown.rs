//! What a lockdown may be, whether it is asked for by the API or by hand in Redis.

use std::ops::RangeInclusive;
use std::time::Duration;

/// How long one is that does not say: the playbook's "all validations fail for one hour".
pub const DEFAULT_TTL: Duration = Duration::from_secs(60 * 60);
/// How long one may be.
pub const TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 60 * 60);
/// Whose keys pass if it does not say: whoever would lift it must get through.
const DEFAULT_EXEMPT: &str = "admin";

/// The roles whose keys pass, each once and in order.
///
/// # Errors
/// Which of them is no role.
pub fn exempt_roles(
    given: Option<Vec<String>>,
    is_role: impl Fn(&str) -> bool,
) -> Result<Vec<String>, String> {
    let mut roles = given.unwrap_or_else(|| vec![DEFAULT_EXEMPT.into()]);
    roles.sort();
    roles.dedup();
    match roles.iter().find(|role| !is_role(role)) {
        Some(unknown) => Err(format!("'exempt_roles': there is no role {unknown:?}")),
        None => Ok(roles),
    }
}

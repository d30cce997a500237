//! The pace of looks that go through the names of all keys in Redis.

use std::time::Duration;

use super::error::LinkError;
use super::link::Link;

/// So many keys are looked through at the pace that is wanted; with more, the pauses grow alike.
const KEYS_PER_LOOK: u64 = 100_000;

/// The pause until the next look, `every` in a small Redis.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn pause(link: &Link, every: Duration) -> Result<Duration, LinkError> {
    let size: u64 = link.query(&redis::cmd("DBSIZE")).await?;
    let looks = u32::try_from(size / KEYS_PER_LOOK).unwrap_or(u32::MAX).saturating_add(1);
    Ok(every.saturating_mul(looks))
}

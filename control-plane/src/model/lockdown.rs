//! What a lockdown may be, whether it is asked for by the API or by hand in Redis.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::model::roles::Roles;

/// How long one is that does not say: the playbook's "all validations fail for one hour".
pub const DEFAULT_TTL: Duration = Duration::from_secs(60 * 60);
/// How long one may be. A longer one is ordered again before its end.
pub const TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60);

/// The roles whose keys pass, each once and in order: those that are given, else all whose keys may lift the lockdown.
/// Without any of the latter it is refused, unless `locks_out_admins` asks for that by name.
///
/// # Errors
/// What is wrong with them.
pub fn exempt_roles(
    given: Option<Vec<String>>,
    locks_out_admins: bool,
    roles: &Roles,
) -> Result<Vec<String>, String> {
    let mut exempt =
        given.unwrap_or_else(|| roles.keys().filter(|role| roles[*role].may_manage()).cloned().collect());
    exempt.sort();
    exempt.dedup();
    if let Some(unknown) = exempt.iter().find(|role| !roles.contains_key(*role)) {
        return Err(format!("'exempt_roles': there is no role {unknown:?}"));
    }
    if !locks_out_admins && !exempt.iter().any(|role| roles[role].may_manage()) {
        return Err("'exempt_roles' has no role that may lift the lockdown (scope system:manage), so no key could end it \
                    early. 'lock_out_admins': true asks for that"
            .into());
    }
    Ok(exempt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::roles;

    #[test]
    fn who_could_lift_it_passes_unless_it_is_asked_for_by_name() {
        let roles = roles::expand(roles::defaults());
        let of = |given: Option<&[&str]>, locks_out_admins| {
            let given = given.map(|given| given.iter().map(|role| (*role).to_owned()).collect());
            exempt_roles(given, locks_out_admins, &roles)
        };
        assert_eq!(of(None, false).unwrap(), ["admin"]);
        assert_eq!(of(Some(&["basic", "admin", "basic"]), false).unwrap(), ["admin", "basic"]);
        assert!(of(Some(&[]), false).unwrap_err().contains("lock_out_admins"));
        assert!(of(Some(&["basic"]), false).unwrap_err().contains("system:manage"));
        assert_eq!(of(Some(&["basic"]), true).unwrap(), ["basic"]);
        assert!(of(Some(&["god"]), true).unwrap_err().contains("no role \"god\""));
    }
}

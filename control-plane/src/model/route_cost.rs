//! Costs of routes that a limit could never pay: no request of a key or client with that limit would pass. Such a cost
//! is refused when it is configured, from the side of the policy and from that of the limits.

use keygate_core::decide::limits::{AN_HOUR_S, Limit, Limits};
use keygate_core::decide::policy::{Access, Policy, Route};
use serde::Serialize;

use crate::model::roles::{Role, Roles};

/// The code of each error over HTTP.
const CODE: &str = "cost_above_limit";

/// A route and a limit below its cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("route {route:?}: {detail}")]
pub struct CostAboveLimit {
    /// The name of the route.
    pub route: String,
    /// `cost_above_limit`.
    pub code: &'static str,
    /// The limit, and what to do.
    pub detail: String,
}

/// The costs that are above a limit in `after` and were not so in `before`: each route once, with the lowest limit that
/// applies to it. An override counts until its end; `now` is in Unix seconds.
///
/// To a route with keys apply the limits of the roles that it admits and whose scopes suffice, and all limits of keys
/// and owners of their own, since these may have any role; to a public one that of clients. A limit of no units applies
/// to none: it is there to refuse everything.
pub fn check(
    before: (&Policy, &Limits),
    after: (&Policy, &Limits),
    roles: &Roles,
    now: u64,
) -> Result<(), Vec<CostAboveLimit>> {
    let known = all(before, roles, now);
    let errors: Vec<CostAboveLimit> =
        all(after, roles, now).into_iter().filter(|error| !known.contains(error)).collect();
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// All costs that are above a limit.
pub fn all((policy, limits): (&Policy, &Limits), roles: &Roles, now: u64) -> Vec<CostAboveLimit> {
    let own = lowest(named("key", &limits.keys).chain(named("owner", &limits.owners)));
    let found = policy.routes.iter().filter_map(|route| {
        let (limit, whose) = match route.access {
            Access::Public => lowest(limits.public.map(|limit| (limit.limit(), "each client".into())).into_iter()),
            Access::Key => {
                let admitted = roles.iter().filter(|(name, role)| admits(route, name, role));
                let of_roles = admitted.flat_map(|(name, _)| of_role(limits, name, now));
                lowest(of_roles.chain(own.clone()))
            }
        }?;
        (route.cost > limit.units).then(|| CostAboveLimit {
            route: route.name.clone(),
            code: CODE,
            detail: format!(
                "it costs {}, and the limit of {whose} is {} in {}: no such request would pass; lower the cost or raise \
                 the limit",
                route.cost,
                limit.units,
                humantime::format_duration(std::time::Duration::from_secs(limit.window_s.into())),
            ),
        })
    });
    found.collect()
}

/// Whether a route lets keys of a role pass that have all of its scopes.
fn admits(route: &Route, name: &String, role: &Role) -> bool {
    (route.roles.is_empty() || route.roles.contains(name))
        && route.scopes.iter().all(|scope| role.scopes.contains(scope))
}

/// The limits of a role: the lasting one and that of an override.
fn of_role(limits: &Limits, name: &str, now: u64) -> impl Iterator<Item = (Limit, String)> {
    let emergency = limits.emergency.as_ref().filter(|emergency| now < emergency.until);
    let units = emergency.and_then(|emergency| emergency.roles.get(name).copied().flatten());
    let overridden =
        units.map(|units| (Limit { units, window_s: AN_HOUR_S }, format!("role {name:?}, by an override,")));
    let lasting = limits.roles.get(name).map(|limit| (*limit, format!("role {name:?}")));
    lasting.into_iter().chain(overridden)
}

fn named<'l>(
    what: &'static str,
    limits: &'l std::collections::BTreeMap<String, Option<Limit>>,
) -> impl Iterator<Item = (Limit, String)> + 'l {
    limits.iter().filter_map(move |(name, limit)| Some(((*limit)?, format!("{what} {name:?}"))))
}

/// The limit with the fewest units, but none.
fn lowest(limits: impl Iterator<Item = (Limit, String)>) -> Option<(Limit, String)> {
    limits.filter(|(limit, _)| limit.units > 0).min_by_key(|(limit, _)| limit.units)
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::limits::Override;
    use serde_json::json;

    use super::*;
    use crate::model::roles;

    fn roles() -> Roles {
        roles::expand(roles::defaults())
    }

    fn policy(routes: serde_json::Value) -> Policy {
        serde_json::from_value(json!({ "routes": routes })).unwrap()
    }

    fn limits(document: serde_json::Value) -> Limits {
        serde_json::from_value(document).unwrap()
    }

    fn units(units: u32) -> serde_json::Value {
        json!({ "units": units, "window_s": 3_600 })
    }

    /// The routes found, with the limit that is named.
    fn found(policy: &Policy, limits: &Limits, now: u64) -> Vec<(String, String)> {
        let whose = |detail: &str| {
            detail.split("the limit of ").nth(1).unwrap().split(" is ").next().unwrap().to_owned()
        };
        let all = all((policy, limits), &roles(), now);
        all.into_iter().map(|error| (error.route.clone(), whose(&error.detail))).collect()
    }

    #[test]
    fn a_cost_is_compared_with_each_limit_that_applies_to_its_route() {
        let policy = policy(json!([
            { "name": "chat", "path": "/chat", "access": "key", "scopes": ["chat:read"], "cost": 101 },
            { "name": "exact", "path": "/exact", "access": "key", "scopes": ["chat:read"], "cost": 100 },
            { "name": "data", "path": "/data", "access": "key", "scopes": ["dataset:read"], "cost": 101 },
            { "name": "nodes", "path": "/nodes", "access": "key", "roles": ["node_operator"], "cost": 101 },
            { "name": "staff", "path": "/staff", "access": "key", "roles": ["admin"], "cost": 4_000_000_000_u32 },
            { "name": "open", "path": "/open", "access": "public", "cost": 11 },
            { "name": "free", "path": "/free", "access": "key", "cost": 0 },
        ]));
        let roles =
            json!({ "basic": units(100), "contributor": units(1_000), "node_operator": units(10_000) });
        let names = |limits: serde_json::Value, now| found(&policy, &self::limits(limits), now);
        let of = |route: &str, whose: &str| (route.to_owned(), whose.to_owned());
        assert_eq!(names(json!({}), 0), []);
        assert_eq!(names(json!({ "roles": roles }), 0), [of("chat", "role \"basic\"")]);
        assert_eq!(names(json!({ "public": units(10) }), 0), [of("open", "each client")]);
        assert_eq!(names(json!({ "public": units(11) }), 0), []);
        // A key of its own or an owner may have any role.
        let of_key = |route: &str| of(route, "key \"key_1\"");
        assert_eq!(
            names(json!({ "keys": { "key_1": units(100), "key_2": null } }), 0),
            ["chat", "data", "nodes", "staff"].map(of_key)
        );
        assert_eq!(
            names(json!({ "keys": { "key_1": units(200) }, "owners": { "acme": units(150) } }), 0),
            [of("staff", "owner \"acme\"")]
        );
        // What allows nothing is no reason.
        let none = json!({ "roles": { "basic": units(0) }, "owners": { "a": units(0) }, "public": units(0) });
        assert_eq!(names(none, 0), []);
        // An override until its end.
        let emergency =
            json!({ "emergency": { "until": 10, "roles": { "contributor": 50, "basic": null } } });
        let by_override = |route: &str| of(route, "role \"contributor\", by an override,");
        assert_eq!(names(emergency.clone(), 9), ["chat", "exact", "data"].map(by_override));
        assert_eq!(names(emergency, 10), []);
    }

    #[test]
    fn only_what_a_change_brings_is_refused_and_says_what_is_wrong() {
        let cheap = policy(json!([{ "name": "chat", "path": "/chat", "access": "key", "cost": 5 }]));
        let dear = policy(json!([
            { "name": "chat", "path": "/chat", "access": "key", "cost": 50 },
            { "name": "other", "path": "/other", "access": "key", "cost": 5 },
        ]));
        let (low, high) = (
            limits(json!({ "roles": { "basic": units(20) } })),
            limits(json!({ "roles": { "basic": units(50) } })),
        );
        type Both<'b> = (&'b Policy, &'b Limits);
        fn check(before: Both<'_>, after: Both<'_>) -> Result<(), Vec<CostAboveLimit>> {
            super::check(before, after, &roles(), 0)
        }
        assert_eq!(check((&cheap, &low), (&dear, &high)), Ok(()));
        let errors = check((&cheap, &low), (&dear, &low)).unwrap_err();
        assert_eq!(check((&dear, &high), (&dear, &low)).unwrap_err(), errors, "from both sides");
        assert_eq!(
            json!(errors),
            json!([{
                "route": "chat", "code": "cost_above_limit",
                "detail": "it costs 50, and the limit of role \"basic\" is 20 in 1h: no such request would pass; lower the \
                           cost or raise the limit",
            }])
        );
        assert_eq!(check((&dear, &low), (&dear, &low)), Ok(()), "it was so before");
        let mut shadow = dear.clone();
        shadow.mode = keygate_core::decide::policy::Mode::Shadow;
        assert_eq!(check((&dear, &low), (&shadow, &low)), Ok(()));
        let with = Limits {
            emergency: Some(Override { until: 9, roles: [("basic".into(), Some(4))].into() }),
            ..high
        };
        assert_eq!(check((&cheap, &low), (&cheap, &with)).unwrap_err().len(), 1);
    }
}

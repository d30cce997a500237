//! Which tests reach V2 while a rollout is under way. What V1 answers says nothing of Keygate, so tests that the rollout
//! sends there are not run.

use keygate_core::decide::rollout::{ApiVersion, FULL_SHARE, Subject};
use keygate_core::decide::rules::Ruleset;

use super::{OWNER, Test};

/// What Envoy sends to the control plane, whatever the rollout says.
const OF_CONTROL_PLANE: [&str; 2] = ["/api/auth/", "/api/admin/"];

/// Whether V2, or the control plane, is to answer a test for certain.
pub fn reaches_v2(rules: &Ruleset, test: &Test, now_s: u64) -> bool {
    // Another host than the proxies is none of the rollout's.
    let is_path = test.endpoint.starts_with('/');
    !is_path || path_reaches_v2(rules, &test.method, &test.endpoint, test.send_key, now_s)
}

/// The same of a path, with or without a key of the canary.
pub fn path_reaches_v2(rules: &Ruleset, method: &str, path: &str, with_key: bool, now_s: u64) -> bool {
    let plan = &rules.rollout;
    if plan.is_settled() || OF_CONTROL_PLANE.iter().any(|prefix| path.starts_with(prefix)) {
        return true;
    }
    let path = path.split('?').next().unwrap_or_default().as_bytes();
    // Without a route it is refused, whatever the rollout says.
    let Some(route) = rules.policy.route(method.as_bytes(), path) else { return true };
    let name = Some(route.name.as_str());
    let goes = |subject: &Subject<'_>| plan.choose(subject, name, path, now_s).version == ApiVersion::V2;
    if with_key {
        // The probe's keys are made for each run, so by the owner, not by an id.
        goes(&Subject::of_key(Some(OWNER), ""))
    } else {
        // By the address that the proxy sees, which is not known here.
        plan.share_at(now_s) == FULL_SHARE && goes(&Subject::of_address(b""))
    }
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::rollout::Rollout;
    use keygate_core::decide::rules::Rules;
    use serde_json::{Value, json};

    use super::*;
    use crate::model::canary::seeds;
    use crate::model::rollout::Flags;

    /// The seeds that are run, and whether the probe is.
    fn run(rollout: Value) -> (Vec<String>, bool) {
        let rollout: Rollout = serde_json::from_value(rollout).unwrap();
        let flags = Flags { rollout, ..Flags::default() };
        let policy = json!({ "routes": [
            { "name": "chat", "path": "/api/chat", "access": "key" },
            { "name": "auth", "path": "/api/auth/*", "access": "key" },
        ]});
        let rules: Rules = serde_json::from_value(json!({
            "format": 1, "issuer": "i", "realm": "r", "leeway_s": 0, "max_life_s": 60, "hard_age_s": 300,
            "keys": [], "policy": policy, "cutoffs": [],
            "rollout": flags.in_force(),
        }))
        .unwrap();
        let rules = Ruleset::try_from(rules).unwrap();
        let seeds = seeds("/api/chat").into_iter().filter(|test| reaches_v2(&rules, test, 1_000));
        (seeds.map(|test| test.id).collect(), path_reaches_v2(&rules, "GET", "/api/chat", true, 1_000))
    }

    #[test]
    fn what_v1_would_answer_is_not_run() {
        const ALL: [&str; 4] = ["seed_validate", "seed_refresh_too_early", "seed_app", "seed_no_key"];
        for (rollout, seeds, probe) in [
            (json!({ "v1_retired": true }), &ALL[..], true),
            (json!({ "v1_retired": false }), &ALL, true),
            // Without a key it goes by the address, which may be among the one of ten.
            (json!({ "strategy": "off", "v1_retired": false }), &ALL[..3], true),
            (json!({ "strategy": "percentage", "share": 9_000, "v1_retired": false }), &ALL[..3], true),
            (json!({ "strategy": "percentage", "share": 10_000, "v1_retired": false }), &ALL, true),
            (
                json!({ "strategy": "canary", "override_users": { OWNER: "v1" }, "v1_retired": false }),
                &ALL[..2],
                false,
            ),
            (json!({ "enabled_endpoints": ["/elsewhere"], "v1_retired": false }), &ALL[..2], false),
        ] {
            let (ran, probed) = run(rollout.clone());
            assert_eq!(
                (ran.iter().map(String::as_str).collect::<Vec<_>>(), probed),
                (seeds.to_vec(), probe),
                "{rollout}"
            );
        }
    }
}

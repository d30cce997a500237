use proptest::prelude::*;
// Its own name is that of the rollout's.
use proptest::strategy::Strategy as Generator;

use super::Strategy;
use super::*;
use crate::decide::rules::MAX_RULES_BYTES;
use crate::token::MAX_TIME;

const NOW: u64 = 1_800_000_000;
const DAY_S: u64 = 86_400;

fn rollout(json: &str) -> Rollout {
    serde_json::from_str(json).unwrap()
}

fn plan(json: &str) -> Plan {
    let rollout = rollout(json);
    assert_eq!(rollout.validate(true), Ok(()), "{json}");
    Plan::new(&rollout)
}

fn percentage(share: u32, salt: &str) -> Plan {
    Plan::new(&Rollout { strategy: Strategy::Percentage, share, salt: salt.into(), ..Rollout::default() })
}

fn ramp(start: u64, ramp_s: u64) -> Gradual {
    Gradual { start, ramp_s: Some(ramp_s), ..Gradual::default() }
}

fn weekly(start: u64) -> Gradual {
    Gradual { start, steps: WEEKLY_STEPS.to_vec(), ..Gradual::default() }
}

fn gradually(gradual: Gradual) -> Plan {
    let rollout = Rollout { strategy: Strategy::Gradual, gradual: Some(gradual), ..Rollout::default() };
    assert_eq!(rollout.validate(true), Ok(()));
    Plan::new(&rollout)
}

fn errors(rollout: &Rollout, has_v1: bool) -> Vec<String> {
    rollout.validate(has_v1).unwrap_err()
}

/// Where a subject goes on a path of its own.
fn chosen(plan: &Plan, subject: Subject<'_>) -> (&'static str, &'static str) {
    let choice = plan.choose(&subject, Some("chat"), b"/api/chat", NOW);
    (choice.version.label(), choice.why.label())
}

#[test]
fn without_a_migration_everything_goes_to_v2() {
    let default = Rollout::default();
    assert_eq!(default, rollout("{}"));
    assert_eq!(serde_json::to_string(&default).unwrap(), r#"{"strategy":"full","v1_retired":true}"#);
    assert_eq!(default.validate(false), Ok(()));
    let plan = Plan::new(&default);
    assert!(plan.is_settled());
    assert_eq!(plan.share_at(0), FULL_SHARE);
    assert_eq!(chosen(&plan, Subject::of_address(b"192.0.2.7")), ("v2", "full"));
    assert_eq!(plan.for_legacy(None, b"/"), Choice { version: ApiVersion::V2, why: Why::Retired });
}

#[test]
fn what_decides_in_which_order() {
    let lists = r#""canary_users":["ann","key_c","pinned"],
        "override_users":{"bob":"v1","key_2":"v2","pinned":"v1","eve":"v2"}"#;
    let with = |strategy: &str| plan(&format!("{{{lists},{strategy}}}"));
    let off = with(r#""strategy":"off""#);
    let canary = with(r#""strategy":"canary""#);
    let none = with(r#""strategy":"percentage","share":0"#);
    let all = with(r#""strategy":"percentage","share":10000"#);
    let before = with(&format!(
        r#""strategy":"gradual","gradual":{{"start":{},"ramp_s":9}}"#,
        NOW.checked_add(1).unwrap()
    ));
    let full = with(r#""strategy":"full""#);
    let key = Subject::of_key;
    for (what, plan, subject, expected) in [
        ("off, a canary user", &off, key(Some("ann"), "key_1"), ("v1", "off")),
        ("off, fixed", &off, key(Some("eve"), "key_1"), ("v2", "override")),
        ("off, anybody", &off, key(None, "key_1"), ("v1", "off")),
        ("canary, by owner", &canary, key(Some("ann"), "key_1"), ("v2", "canary_user")),
        ("canary, by key", &canary, key(Some("joe"), "key_c"), ("v2", "canary_user")),
        ("canary, anybody", &canary, key(Some("joe"), "key_1"), ("v1", "no_canary_user")),
        ("canary, no letter more", &canary, key(Some("ann "), "key_1"), ("v1", "no_canary_user")),
        ("canary, fixed and a canary user", &canary, key(Some("pinned"), "key_1"), ("v1", "override")),
        ("fixed, the key before its owner", &canary, key(Some("bob"), "key_2"), ("v2", "override")),
        ("fixed, the owner before a canary key", &canary, key(Some("bob"), "key_c"), ("v1", "override")),
        ("canary, nobody", &canary, Subject::of_address(b"ann"), ("v1", "no_canary_user")),
        ("0 %, a canary user", &none, key(Some("ann"), "key_1"), ("v2", "canary_user")),
        ("0 %, anybody", &none, key(Some("joe"), "key_1"), ("v1", "percentage")),
        ("0 %, fixed", &none, key(None, "key_2"), ("v2", "override")),
        ("100 %, anybody", &all, key(Some("joe"), "key_1"), ("v2", "percentage")),
        ("100 %, fixed", &all, key(Some("bob"), "key_1"), ("v1", "override")),
        ("not begun, a canary user", &before, key(Some("ann"), "key_1"), ("v2", "canary_user")),
        ("not begun, anybody", &before, key(Some("joe"), "key_1"), ("v1", "gradual")),
        ("full, fixed", &full, key(Some("bob"), "key_1"), ("v1", "override")),
        ("full, anybody", &full, key(Some("joe"), "key_1"), ("v2", "full")),
    ] {
        assert_eq!(chosen(plan, subject), expected, "{what}");
    }
    assert!(![off, canary, none, all, before, full].iter().any(Plan::is_settled));
}

#[test]
fn only_enabled_endpoints_are_migrated() {
    let plan = plan(
        r#"{"enabled_endpoints":["chat","/api/auth/validate","/v2/","/caf%C3%A9"],
            "override_users":{"eve":"v2"},"strategy":"full"}"#,
    );
    for (route, path, enabled) in [
        (Some("chat"), "/anything", true),
        (Some("Chat"), "/anything", false),
        (Some("chatter"), "/anything", false),
        (None, "/api/auth/validate", true),
        (Some("other"), "/api/auth/validate", true),
        (None, "/api/auth/validate/", true),
        (None, "/api/auth/validate/x/y", true),
        (None, "/api/auth/%76alidate", true),
        (None, "/api/auth/validated", false),
        (None, "/api/auth", false),
        (None, "/API/auth/validate", false),
        (None, "/x/api/auth/validate", false),
        (None, "/api/auth/validate/../register", false),
        (None, "/v2", false),
        (None, "/v2/", true),
        (None, "/v2/x", true),
        (None, "/v20", false),
        (None, "/caf%c3%a9", true),
        (None, "", false),
        (None, "chat", false),
    ] {
        let version = if enabled { ApiVersion::V2 } else { ApiVersion::V1 };
        let subject = Subject::of_key(None, "key_1");
        let choice = plan.choose(&subject, route, path.as_bytes(), NOW);
        let why = if enabled { Why::Full } else { Why::Endpoint };
        assert_eq!(choice, Choice { version, why }, "{route:?} {path}");
        // Before a fixed version, and for legacy credentials too.
        let fixed = plan.choose(&Subject::of_key(Some("eve"), "key_1"), route, path.as_bytes(), NOW);
        assert_eq!(fixed.version, version, "{route:?} {path}");
        assert_eq!(plan.for_legacy(route, path.as_bytes()).version, version, "{route:?} {path}");
    }
    let everything = Plan::new(&rollout(r#"{"enabled_endpoints":["/"]}"#));
    for path in [&b"/"[..], b"/a", b"/a/b/"] {
        assert_eq!(everything.choose(&Subject::of_address(b""), None, path, NOW).why, Why::Full);
    }
    let by_name = Plan::new(&rollout(r#"{"enabled_endpoints":["chat"]}"#));
    assert_eq!(by_name.choose(&Subject::of_address(b""), None, b"/chat", NOW).why, Why::Endpoint);
}

#[test]
fn a_legacy_credential_stays_with_v1_until_it_is_retired() {
    for (json, expected) in [
        (r#"{"strategy":"full","v1_retired":false}"#, ("v1", "legacy")),
        (r#"{"strategy":"full","v1_retired":true}"#, ("v2", "retired")),
        (r#"{"strategy":"percentage","share":10000,"v1_retired":false}"#, ("v1", "legacy")),
        (r#"{"strategy":"percentage","share":1,"v1_retired":true}"#, ("v2", "retired")),
        (r#"{"strategy":"canary","v1_retired":true}"#, ("v2", "retired")),
        (r#"{"strategy":"off","v1_retired":false}"#, ("v1", "off")),
        // The way back in an incident must work for everybody who was served before.
        (r#"{"strategy":"off"}"#, ("v1", "off")),
        (r#"{"strategy":"full","enabled_endpoints":["/x"]}"#, ("v1", "endpoint")),
    ] {
        let choice = plan(json).for_legacy(Some("chat"), b"/api/chat");
        assert_eq!((choice.version.label(), choice.why.label()), expected, "{json}");
    }
}

#[test]
fn only_a_settled_rollout_needs_no_v1() {
    for (json, members) in [
        (r"{}", &[][..]),
        (r#"{"override_users":{"ann":"v2"},"canary_users":["bob"],"share":7,"salt":"x"}"#, &[]),
        (r#"{"gradual":{"start":1,"ramp_s":1}}"#, &[]),
        (r#"{"strategy":"off"}"#, &["strategy"]),
        (r#"{"strategy":"canary"}"#, &["strategy"]),
        (r#"{"strategy":"percentage","share":10000}"#, &["strategy"]),
        (r#"{"strategy":"gradual","gradual":{"start":1,"ramp_s":1}}"#, &["strategy"]),
        (r#"{"override_users":{"ann":"v2","bob":"v1"}}"#, &["override_users"]),
        (r#"{"enabled_endpoints":["/"]}"#, &["enabled_endpoints"]),
        (r#"{"v1_retired":false}"#, &["v1_retired"]),
        (
            r#"{"strategy":"off","v1_retired":false,"override_users":{"a":"v1"},"enabled_endpoints":["a"]}"#,
            &["strategy", "override_users", "enabled_endpoints", "v1_retired"],
        ),
    ] {
        let rollout = rollout(json);
        assert_eq!(rollout.validate(true), Ok(()), "{json}");
        assert_eq!(rollout.is_settled(), members.is_empty(), "{json}");
        let found = rollout.validate(false).err().unwrap_or_default();
        let found: Vec<&str> = found.iter().map(|error| error.split_once(':').unwrap().0).collect();
        assert_eq!(found, members, "{json}");
    }
}

#[test]
fn every_error_is_named_at_once() {
    let wrong = Rollout {
        share: 10_001,
        canary_users: ["", "ok", "a b", "x\n"].map(String::from).into(),
        override_users: [("é".into(), ApiVersion::V1)].into(),
        enabled_endpoints: ["/a/../b", "/a?x", "/api/*", "a b", "", "/ok", "ok"].map(String::from).into(),
        salt: "a\u{7}".into(),
        gradual: Some(Gradual {
            start: MAX_TIME + 1,
            ramp_s: Some(0),
            steps: vec![
                Step { share: 0, hold_s: 1 },
                Step { share: 500, hold_s: 0 },
                Step { share: 500, hold_s: 1 },
                Step { share: 10_001, hold_s: MAX_SPAN_S + 1 },
            ],
            paused_at: Some(u64::MAX),
        }),
        ..Rollout::default()
    };
    let found = errors(&wrong, true);
    let members: Vec<&str> = found.iter().map(|error| error.split_once(':').unwrap().0).collect();
    assert_eq!(
        members,
        [
            "share",
            "canary_users",
            "override_users",
            "enabled_endpoints",
            "enabled_endpoints",
            "enabled_endpoints",
            "enabled_endpoints",
            "enabled_endpoints",
            "salt",
            "gradual.start",
            "gradual.paused_at",
            "gradual.steps",
            "gradual.ramp_s",
            "gradual.steps[0].share",
            "gradual.steps[1].hold_s",
            "gradual.steps[2].share",
            "gradual.steps[3].share",
            "gradual.steps[3].hold_s",
        ],
        "{found:#?}"
    );
    assert_eq!(
        found[1],
        "canary_users: \"\" and 2 more are no owner or key id; 1 to 256 bytes of visible ASCII"
    );
    assert_eq!(found[2], "override_users: \"é\" is no owner or key id; 1 to 256 bytes of visible ASCII");
}

#[test]
fn gradual_needs_exactly_one_pace() {
    let gradual = |gradual| Rollout { strategy: Strategy::Gradual, gradual, ..Rollout::default() };
    assert_eq!(gradual(Some(ramp(1, 1))).validate(true), Ok(()));
    assert_eq!(gradual(Some(weekly(0))).validate(true), Ok(()));
    assert!(errors(&gradual(None), true)[0].starts_with("gradual: "));
    let neither = Gradual { start: 1, ..Gradual::default() };
    assert!(errors(&gradual(Some(neither)), true)[0].starts_with("gradual.steps: must not be empty"));
    let both = Gradual { ramp_s: Some(1), ..weekly(1) };
    assert!(errors(&gradual(Some(both)), true)[0].starts_with("gradual.steps: must not stand beside"));
    assert!(serde_json::from_str::<Rollout>(r#"{"gradual":{"ramp_s":1}}"#).is_err(), "no start");
}

#[test]
fn sizes_are_limited_to_what_the_rules_can_carry() {
    let names = |count: usize| (0..count).map(|n| format!("u{n:05}"));
    let canary = |count| Rollout { canary_users: names(count).collect(), ..Rollout::default() };
    assert_eq!(canary(MAX_USERS).validate(true), Ok(()));
    assert!(errors(&canary(MAX_USERS + 1), true)[0].starts_with("canary_users: 10001 users"));
    let fixed = |count| Rollout {
        override_users: names(count).map(|name| (name, ApiVersion::V2)).collect(),
        ..Rollout::default()
    };
    assert!(errors(&fixed(MAX_USERS + 1), true)[0].starts_with("override_users: 10001 users"));
    let endpoints = |count| Rollout { enabled_endpoints: names(count).collect(), ..Rollout::default() };
    assert_eq!(endpoints(MAX_ENDPOINTS).validate(true), Ok(()));
    assert_eq!(errors(&endpoints(MAX_ENDPOINTS + 1), true).len(), 1);

    let one = |user: String| Rollout { canary_users: [user].into(), ..Rollout::default() };
    assert_eq!(one("u".repeat(256)).validate(true), Ok(()));
    let found = errors(&one("u".repeat(100_000)), true);
    assert!(found[0].len() < 200, "an error shows the beginning only: {found:?}");
    let path = |bytes: usize| Rollout {
        enabled_endpoints: [format!("/{}", "p".repeat(bytes - 1))].into(),
        ..Rollout::default()
    };
    assert_eq!(path(MAX_ENDPOINT_BYTES).validate(true), Ok(()));
    assert_eq!(errors(&path(MAX_ENDPOINT_BYTES + 1), true).len(), 1);
    let salt = |bytes: usize| Rollout { salt: "s".repeat(bytes), ..Rollout::default() };
    assert_eq!(salt(MAX_SALT_BYTES).validate(true), Ok(()));
    assert_eq!(errors(&salt(MAX_SALT_BYTES + 1), true).len(), 1);
    let steps = |count: u32| Rollout {
        gradual: Some(Gradual {
            steps: (1..=count).map(|share| Step { share, hold_s: 1 }).collect(),
            ..Gradual::default()
        }),
        ..Rollout::default()
    };
    assert_eq!(steps(100).validate(true), Ok(()));
    assert_eq!(errors(&steps(101), true).len(), 1);

    // All the users, each of a length that is allowed, and yet too much.
    let long =
        Rollout { canary_users: names(700).map(|name| name.repeat(40)).collect(), ..Rollout::default() };
    let found = errors(&long, true);
    assert!(found.len() == 1 && found[0].contains("name fewer"), "{found:?}");
    const { assert!(MAX_BYTES < MAX_RULES_BYTES) };
}

#[test]
fn documents_that_are_none_are_refused() {
    for json in [
        "",
        "null",
        "[]",
        r#"["off"]"#,
        "\"off\"",
        r#"{"strategy":"Full"}"#,
        r#"{"strategy":"half"}"#,
        r#"{"strategy":"off","strategy":"full"}"#,
        r#"{"share":-1}"#,
        r#"{"share":0.5}"#,
        r#"{"share":"5"}"#,
        r#"{"share":4294967296}"#,
        r#"{"percentage":5}"#,
        r#"{"override_users":{"ann":"v3"}}"#,
        r#"{"override_users":["ann"]}"#,
        r#"{"canary_users":"ann"}"#,
        r#"{"gradual":{"start":1,"ramp_s":1,"x":1}}"#,
        r#"{"gradual":{"start":1,"steps":[{"share":1}]}}"#,
    ] {
        assert!(serde_json::from_str::<Rollout>(json).is_err(), "{json}");
    }
}

#[test]
fn golden_bytes_whatever_the_order_of_the_sets() {
    let one = r#"{"strategy":"gradual","share":25,"canary_users":["ann","bob"],"override_users":{"key_1":"v1","zoe":"v2"},"enabled_endpoints":["/api/chat","chat"],"salt":"s","gradual":{"start":7,"steps":[{"share":500,"hold_s":60}],"paused_at":9},"v1_retired":false}"#;
    let other = r#"{"v1_retired":false,"gradual":{"paused_at":9,"steps":[{"hold_s":60,"share":500}],"start":7},
        "salt":"s","enabled_endpoints":["chat","/api/chat","chat"],"override_users":{"zoe":"v2","key_1":"v1"},
        "canary_users":["bob","ann"],"share":25,"strategy":"gradual"}"#;
    assert_eq!(rollout(one), rollout(other));
    assert_eq!(serde_json::to_string(&rollout(other)).unwrap(), one);
}

/// From an implementation of its own, in another language. A change here moves users in the middle of a
/// migration.
#[test]
fn golden_hashes_and_buckets() {
    let salts = ["", "v2-2026", "ä"];
    for (subject, hash, buckets) in [
        (Subject::of_key(Some("acme"), "key_1"), 0x74b5_f287_c772_05a4, [8_662, 766, 2_310]),
        (Subject::of_key(Some("user-1"), "key_1"), 0xbb86_d757_91b4_3bc0, [2_015, 9_858, 6_301]),
        (Subject::of_key(None, "key_1"), 0x1689_6b48_fa83_000d, [4_022, 2_717, 6_462]),
        (Subject::of_key(None, "acme"), 0x2060_44e8_009f_e4c8, [7_934, 6_068, 1_646]),
        (Subject::of_legacy(b"sk-legacy-1"), 0x15cc_3a55_b617_7981, [8_657, 3_048, 3_669]),
        (Subject::of_legacy(b""), 0x084f_ed08_b978_af4d, [9_028, 4_821, 3_485]),
        (Subject::of_address(b"192.0.2.7"), 0x42f0_652d_9f4e_9d2d, [7_780, 4_065, 4_959]),
        (Subject::of_address(b"2001:db8::7"), 0xd337_7f6c_3e74_44f1, [8_549, 7_055, 1_023]),
    ] {
        assert_eq!(subject.hash, hash, "{subject:?}");
        assert_eq!(salts.map(|salt| percentage(0, salt).bucket(&subject)), buckets, "{subject:?}");
        if let Some(key_id) = subject.key_id {
            assert_eq!(Subject::of_parts(subject.owner, key_id, hash), subject);
        }
    }
    // No hash is beyond the last bucket.
    for hash in [0, 1, u64::MAX] {
        assert!(percentage(0, "").bucket(&Subject { owner: None, key_id: None, hash }) < FULL_SHARE);
    }
}

/// The first number that SplitMix64 gives with seed 0, as its published implementations do.
#[test]
fn the_mixer_is_that_of_splitmix64() {
    assert_eq!(plan::mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
}

#[test]
fn steps_begin_and_stay() {
    let gradual = weekly(NOW);
    let week = 7 * DAY_S;
    for (now, share, next) in [
        (0, 0, Some((NOW, 500))),
        (NOW - 1, 0, Some((NOW, 500))),
        (NOW, 500, Some((NOW + week, 2_500))),
        (NOW + week - 1, 500, Some((NOW + week, 2_500))),
        (NOW + week, 2_500, Some((NOW + 2 * week, 5_000))),
        (NOW + 2 * week, 5_000, Some((NOW + 3 * week, 10_000))),
        (NOW + 3 * week, 10_000, None),
        (NOW + 9 * week, 10_000, None),
        (u64::MAX, 10_000, None),
    ] {
        assert_eq!(gradual.share_at(now), share, "{now}");
        assert_eq!(gradual.next_step(now), next, "{now}");
    }
    let half = Gradual { steps: WEEKLY_STEPS[..3].to_vec(), ..weekly(NOW) };
    assert_eq!((half.share_at(u64::MAX), half.next_step(NOW + 2 * week)), (5_000, None));
}

#[test]
fn a_ramp_rises_evenly() {
    let gradual = ramp(NOW, 10 * DAY_S);
    for (now, share, next) in [
        (0, 0, Some((NOW + 8_640, 100))),
        (NOW - 1, 0, Some((NOW + 8_640, 100))),
        (NOW, 0, Some((NOW + 8_640, 100))),
        (NOW + 8_639, 99, Some((NOW + 8_640, 100))),
        (NOW + 8_640, 100, Some((NOW + 17_280, 200))),
        (NOW + 5 * DAY_S, 5_000, Some((NOW + 5 * DAY_S + 8_640, 5_100))),
        (NOW + 10 * DAY_S - 1, 9_999, Some((NOW + 10 * DAY_S, 10_000))),
        (NOW + 10 * DAY_S, 10_000, None),
        (u64::MAX, 10_000, None),
    ] {
        assert_eq!(gradual.share_at(now), share, "{now}");
        assert_eq!(gradual.next_step(now), next, "{now}");
    }
    // Several percents in a second.
    assert_eq!(ramp(NOW, 10).next_step(NOW), Some((NOW + 1, 1_000)));
    assert_eq!(ramp(NOW, 1).next_step(NOW), Some((NOW + 1, 10_000)));
}

#[test]
fn a_plan_grows_only_by_its_own_strategy() {
    assert_eq!(gradually(weekly(NOW)).share_at(NOW), 500);
    assert_eq!(gradually(weekly(NOW)).next_step(0), Some((NOW, 500)));
    let idle = Rollout { gradual: Some(weekly(NOW)), share: 7, ..Rollout::default() };
    for (strategy, share) in
        [(Strategy::Off, 0), (Strategy::Canary, 0), (Strategy::Percentage, 7), (Strategy::Full, FULL_SHARE)]
    {
        let plan = Plan::new(&Rollout { strategy, ..idle.clone() });
        assert_eq!((plan.strategy(), plan.share_at(NOW), plan.next_step(0)), (strategy, share, None));
    }
}

#[test]
fn the_ends_of_time_are_no_trouble() {
    let ends = [0, 1, MAX_TIME, u64::MAX - 1, u64::MAX];
    for start in ends {
        for span in ends {
            let steps = vec![Step { share: 1, hold_s: span }, Step { share: 2, hold_s: span }];
            for gradual in [
                Gradual { start, ..Gradual::default() },
                ramp(start, span),
                Gradual { start, steps, ..Gradual::default() },
            ] {
                for paused_at in [None, Some(0), Some(u64::MAX)] {
                    let mut gradual = Gradual { paused_at, ..gradual.clone() };
                    for now in ends {
                        assert!(gradual.share_at(now) <= FULL_SHARE);
                        assert!(gradual.next_step(now).is_none_or(|(when, _)| when > now));
                    }
                    gradual.pause(u64::MAX);
                    gradual.resume(u64::MAX);
                    gradual.resume(0);
                }
            }
        }
    }
}

#[test]
fn a_pause_keeps_the_share_and_delays_the_rest() {
    let mut gradual = weekly(NOW);
    gradual.pause(NOW + 8 * DAY_S);
    assert_eq!(gradual.share_at(NOW + 300 * DAY_S), 2_500);
    assert_eq!(gradual.next_step(NOW + 8 * DAY_S), None);
    // A clock that is behind never has a larger share than without the pause.
    assert_eq!(gradual.share_at(NOW), 500);
    gradual.pause(NOW + 20 * DAY_S);
    assert_eq!(gradual.paused_at, Some(NOW + 8 * DAY_S), "the first pause goes on");
    gradual.resume(NOW + 108 * DAY_S);
    assert_eq!(gradual, weekly(NOW + 100 * DAY_S));
    assert_eq!(gradual.next_step(NOW + 108 * DAY_S), Some((NOW + 114 * DAY_S, 5_000)));

    // A pause to come: steps before it still happen.
    let later = Gradual { paused_at: Some(NOW + 7 * DAY_S), ..weekly(NOW) };
    assert_eq!(later.next_step(NOW), Some((NOW + 7 * DAY_S, 2_500)));
    assert_eq!(later.next_step(NOW + 7 * DAY_S), None);
    assert_eq!(later.share_at(NOW + 1), 500);

    // A clock that went back: nothing is shifted.
    let mut back = weekly(NOW);
    back.pause(NOW + 5);
    back.resume(NOW);
    assert_eq!(back, weekly(NOW));
}

#[test]
fn labels_are_distinct_and_indices_are_places() {
    let labels: BTreeSet<&str> = Why::ALL.iter().map(|why| why.label()).collect();
    assert_eq!(labels.len(), Why::ALL.len());
    for (place, why) in Why::ALL.into_iter().enumerate() {
        assert_eq!(why.index(), place);
    }
    for strategy in [Strategy::Off, Strategy::Canary, Strategy::Percentage, Strategy::Gradual, Strategy::Full]
    {
        assert_eq!(serde_json::to_value(strategy).unwrap(), strategy.label());
    }
    for version in [ApiVersion::V1, ApiVersion::V2] {
        assert_eq!(serde_json::to_value(version).unwrap(), version.label());
    }
}

const SUBJECTS: u32 = 100_000;

fn owners(prefix: &str) -> Vec<String> {
    (0..SUBJECTS).map(|n| format!("{prefix}{n}")).collect()
}

/// How far a count is from what is expected of `SUBJECTS` draws, in standard deviations of the binomial.
fn deviation(count: usize, probability: f64) -> f64 {
    let expected = f64::from(SUBJECTS) * probability;
    let sigma = (expected * (1.0 - probability)).sqrt();
    let off = (count as f64 - expected).abs();
    if off == 0.0 { 0.0 } else { off / sigma }
}

#[test]
fn a_share_is_hit() {
    for (prefix, salt) in [("user-", ""), ("user-", "again"), ("0", "v2-2026"), ("acme/team/", "x")] {
        let owners = owners(prefix);
        for share in [0, 1, 10, 100, 500, 2_500, 5_000, 9_999, 10_000] {
            let plan = percentage(share, salt);
            let to_v2 = |owner: &&String| chosen(&plan, Subject::of_key(Some(owner), "k")).0 == "v2";
            let count = owners.iter().filter(to_v2).count();
            let deviation = deviation(count, f64::from(share) / f64::from(FULL_SHARE));
            assert!(deviation < 4.5, "{prefix:?} {salt:?} {share}: {count}, {deviation} deviations");
        }
    }
}

#[test]
fn two_salts_draw_independently() {
    let owners = owners("user-");
    for (one, other) in [("", "1"), ("1", "2"), ("v2", "v2 ")] {
        for (a, b) in [(100, 100), (500, 5_000), (2_500, 2_500), (5_000, 5_000)] {
            let (plan_a, plan_b) = (percentage(a, one), percentage(b, other));
            let in_both = |owner: &&String| {
                let subject = Subject::of_key(Some(owner), "k");
                plan_a.bucket(&subject) < a && plan_b.bucket(&subject) < b
            };
            let count = owners.iter().filter(in_both).count();
            let deviation = deviation(count, f64::from(a) * f64::from(b) / 1e8);
            assert!(deviation < 4.5, "{one:?} {other:?} {a} {b}: {count}, {deviation} deviations");
        }
    }
}

fn user() -> impl Generator<Value = String> {
    "[a-e]{1,2}"
}

fn any_strategy() -> impl Generator<Value = Strategy> {
    prop::sample::select(vec![
        Strategy::Off,
        Strategy::Canary,
        Strategy::Percentage,
        Strategy::Gradual,
        Strategy::Full,
    ])
}

fn any_gradual() -> impl Generator<Value = Gradual> {
    let start = prop_oneof![0..2_000_u64, NOW - 1_000..NOW + 1_000, 0..=MAX_TIME];
    let span = || prop_oneof![1..200_u64, 1..=MAX_SPAN_S];
    let steps = prop::collection::btree_map(1..=FULL_SHARE, span(), 1..6).prop_map(|steps| {
        (None, steps.into_iter().map(|(share, hold_s)| Step { share, hold_s }).collect::<Vec<_>>())
    });
    let pace = prop_oneof![span().prop_map(|ramp_s| (Some(ramp_s), Vec::new())), steps];
    let paused_at = prop::option::of(0..=MAX_TIME);
    (start, pace, paused_at).prop_map(|(start, (ramp_s, steps), paused_at)| Gradual {
        start,
        ramp_s,
        steps,
        paused_at,
    })
}

prop_compose! {
    fn any_rollout()(
        strategy in any_strategy(),
        share in 0..=FULL_SHARE,
        canary_users in prop::collection::btree_set(user(), 0..5),
        override_users in prop::collection::btree_map(
            user(), prop::sample::select(vec![ApiVersion::V1, ApiVersion::V2]), 0..4),
        enabled_endpoints in prop::collection::btree_set("/?[a-c](/[a-c])?", 0..3)
            .prop_map(|set| set.into_iter().filter(|e| e.starts_with('/') || !e.contains('/')).collect()),
        salt in "[a-z]{0,4}",
        gradual in any_gradual(),
        v1_retired in any::<bool>(),
    ) -> Rollout {
        let gradual = Some(gradual);
        Rollout {
            strategy, share, canary_users, override_users, enabled_endpoints, salt, gradual, v1_retired
        }
    }
}

/// The decision said in another way: the document, step by step, without what a plan prepares.
fn as_the_design_says(
    rollout: &Rollout,
    subject: &Subject<'_>,
    route: &str,
    path: &str,
    now: u64,
) -> ApiVersion {
    let names: Vec<&str> = [subject.key_id, subject.owner].into_iter().flatten().collect();
    let below = |tree: &String| path == tree || path.starts_with(&format!("{tree}/"));
    if !rollout.enabled_endpoints.is_empty()
        && !rollout.enabled_endpoints.iter().any(|e| if e.starts_with('/') { below(e) } else { e == route })
    {
        return ApiVersion::V1;
    }
    if let Some(version) = names.iter().find_map(|name| rollout.override_users.get(*name)) {
        return *version;
    }
    let share = match rollout.strategy {
        Strategy::Off => return ApiVersion::V1,
        Strategy::Full => return ApiVersion::V2,
        _ if names.iter().any(|name| rollout.canary_users.contains(*name)) => return ApiVersion::V2,
        Strategy::Canary => 0,
        Strategy::Percentage => rollout.share,
        Strategy::Gradual => rollout.gradual.as_ref().unwrap().share_at(now),
    };
    let bucket = percentage(0, &rollout.salt).bucket(subject);
    if bucket < share { ApiVersion::V2 } else { ApiVersion::V1 }
}

proptest! {
    #[test]
    fn the_plan_does_what_the_document_says(
        rollout in any_rollout(),
        owner in prop::option::of(user()),
        key_id in user(),
        route in "[a-c]",
        path in "/[a-c](/[a-c]){0,2}",
        now in prop_oneof![0..3_000_u64, NOW - 2_000..NOW + 2_000, any::<u64>()],
    ) {
        prop_assert_eq!(rollout.validate(true), Ok(()));
        let subject = Subject::of_key(owner.as_deref(), &key_id);
        let plan = Plan::new(&rollout);
        let choice = plan.choose(&subject, Some(&route), path.as_bytes(), now);
        prop_assert_eq!(choice.version, as_the_design_says(&rollout, &subject, &route, &path, now));

        // The same from the bytes that travel, and from a plan of its own.
        let bytes = serde_json::to_vec(&rollout).unwrap();
        let read: Rollout = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(&read, &rollout);
        prop_assert_eq!(serde_json::to_vec(&read).unwrap(), bytes);
        prop_assert_eq!(Plan::new(&read).choose(&subject, Some(&route), path.as_bytes(), now), choice);

        // Nothing needs V1 that may stand without it.
        if rollout.validate(false).is_ok() {
            prop_assert_eq!(choice.version, ApiVersion::V2);
            prop_assert_eq!(plan.for_legacy(Some(&route), path.as_bytes()).version, ApiVersion::V2);
        }
    }

    #[test]
    fn raising_the_share_moves_nobody_back(
        rollout in any_rollout(),
        more in 0..=FULL_SHARE,
        owner in prop::option::of(user()),
        key_id in user(),
    ) {
        let subject = Subject::of_key(owner.as_deref(), &key_id);
        let version = |strategy, share| {
            let rollout = Rollout { strategy, share, ..rollout.clone() };
            Plan::new(&rollout).choose(&subject, Some("a"), b"/a", NOW).version
        };
        let (low, high) = (rollout.share.min(more), rollout.share.max(more));
        let path = [
            version(Strategy::Off, 0),
            version(Strategy::Canary, 0),
            version(Strategy::Percentage, low),
            version(Strategy::Percentage, high),
            version(Strategy::Percentage, FULL_SHARE),
            version(Strategy::Full, 0),
        ];
        prop_assert!(path.is_sorted(), "{:?}", path);
    }

    #[test]
    fn the_gradual_share_never_falls(gradual in any_gradual(), a in any::<u64>(), b in 0..4_000_u64, c in NOW - 5_000..NOW + 5_000) {
        let mut times = [a, b, c, a.saturating_add(b), gradual.start.saturating_add(b), gradual.start];
        times.sort_unstable();
        let shares = times.map(|now| gradual.share_at(now));
        prop_assert!(shares.is_sorted() && shares[5] <= FULL_SHARE, "{:?}", shares);
        for now in times {
            if now < gradual.start {
                prop_assert_eq!(gradual.share_at(now), 0);
            }
            if let Some((when, share)) = gradual.next_step(now) {
                // It comes then, it is more, and no step comes before it.
                prop_assert!(when > now && share == gradual.share_at(when) && share > gradual.share_at(now));
                let percents = |share: u32| if gradual.ramp_s.is_some() { share / 100 } else { share };
                prop_assert_eq!(percents(gradual.share_at(when - 1)), percents(gradual.share_at(now)));
                prop_assert!(percents(share) > percents(gradual.share_at(now)));
            } else if gradual.paused_at.is_none() {
                prop_assert_eq!(gradual.share_at(now), gradual.share_at(u64::MAX));
            }
        }
    }

    #[test]
    fn a_pause_and_its_end_keep_the_share(gradual in any_gradual(), at in 0..NOW * 2, length in 0..NOW, after in 0..NOW) {
        let running = Gradual { paused_at: None, ..gradual };
        let share = running.share_at(at);
        let mut other = running.clone();
        other.pause(at);
        for now in [at, at + length / 2, at + length, u64::MAX] {
            prop_assert_eq!(other.share_at(now), share);
            prop_assert_eq!(other.next_step(now), None);
        }
        other.resume(at + length);
        prop_assert_eq!(other.share_at(at + length), share);
        prop_assert_eq!(other.share_at(at + length + after), running.share_at(at + after));
    }

    #[test]
    fn any_document_is_read_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        json in r#"\{("(strategy|share|gradual|salt|canary_users|override_users|enabled_endpoints)":("off"|"gradual"|99999|\{"start":18446744073709551615,"ramp_s":18446744073709551615\}|\{"start":0,"steps":\[\{"share":4294967295,"hold_s":0\}\]\}|\["","/","//","/%"\]|\{"":"v1"\})){0,1}\}"#,
        now in any::<u64>(),
    ) {
        for document in [bytes, json.into_bytes()] {
            let Ok(rollout) = serde_json::from_slice::<Rollout>(&document) else { continue };
            let _ = rollout.validate(false);
            let plan = Plan::new(&rollout);
            let _ = plan.choose(&Subject::of_legacy(&document), Some(""), &document, now);
            prop_assert!(plan.share_at(now) <= FULL_SHARE);
            let _ = plan.next_step(now);
        }
    }
}

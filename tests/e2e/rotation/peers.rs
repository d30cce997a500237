//! Several control planes over one Redis: one rotation for all of them, and no key of any that a proxy of another
//! would refuse.

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::envoy::Neighbours;
use keygate_e2e::wait::try_wait_for;
use keygate_e2e::{
    Api, Connection, Envoy, Key, Line, Load, Redis, Request, Response, SOON, Stack, line, wait_until,
};
use serde_json::json;

use super::begun::at_once;
use super::{
    FORCE, ROTATE, active, all_workers, assert_all_answer, begin, chat, kid_of, rotated, rotated_with, stage,
    status, text, the_one_active, wait_tidy,
};

/// Two control planes with a proxy each, of which the second one's line can be cut.
struct Two {
    // In the order in which they stop.
    envoy: Envoy,
    line: Line,
    to_redis: [Line; 2],
    other: ControlPlane,
    stack: Stack,
    redis: Redis,
}

impl Two {
    #[track_caller]
    fn start(config: &str) -> Self {
        let redis = Redis::start();
        let to_redis = [Line::relay(redis.port()), Line::relay(redis.port())];
        let url = |line: &Line| format!("redis://127.0.0.1:{}", line.port());
        let stack = Stack::builder().workers(2).redis(&url(&to_redis[0])).config(config).start();
        let mut other = ControlPlane::beside(&stack.control_plane, &stack.directory().join("b"));
        std::fs::write(other.config_file(), config).expect("the configuration");
        other.use_redis(&url(&to_redis[1]));
        other.start();
        let line = Line::to(other.sync_port());
        let mut envoy = Envoy::new(stack.directory(), "envoy-b", 2);
        envoy.use_source(line::SOURCE);
        let (api_port, sync_port) = (other.api_port(), line.port());
        envoy.start(&Neighbours { api_port, sync_port, ..stack.neighbours() });
        envoy.wait_ready();
        let two = Self { envoy, line, to_redis, other, stack, redis };
        let (here, there) = two.apis();
        // Until then each is alone, as far as it knows, and has a secret of its own.
        wait_until(SOON, "both to sign with one secret", || {
            there.get("/api/admin/emergency").status == 200 && active(&here) == active(&there)
        });
        let mut workers = two.workers();
        wait_until(SOON, "keys of each to pass at both", || {
            [&here, &there].iter().all(|api| {
                let key = api.issue("basic");
                workers.iter_mut().all(|worker| worker.send(&chat(&key)).status == 200)
            })
        });
        two
    }

    fn apis(&self) -> (Api, Api) {
        let here = self.stack.api();
        let there = Api::new(self.other.api_port(), &here.key());
        (here, there)
    }

    /// Uses these keys all the time, on both proxies and both control planes.
    fn uses(&self, keys: &[Key]) -> Vec<Load> {
        let of = |path: &'static str, ports: [u16; 2]| {
            let requests: Vec<Request> =
                keys.iter().map(|key| Request::get(path).bearer(&key.token)).collect();
            ports.map(|port| {
                let connections = (0..2).map(|_| Connection::open(port).expect("it listens")).collect();
                let (requests, mut turn) = (requests.clone(), 0);
                Load::start(connections, 500, move || {
                    turn += 1;
                    requests[turn % requests.len()].clone()
                })
            })
        };
        let proxies = of("/api/chat", [self.stack.envoy.port(), self.envoy.port()]);
        let control_planes =
            of("/api/auth/validate", [self.stack.control_plane.api_port(), self.other.api_port()]);
        proxies.into_iter().chain(control_planes).collect()
    }

    /// Of both proxies.
    fn workers(&self) -> Vec<Connection> {
        all_workers(&[&self.stack.envoy, &self.envoy])
    }
}

/// Panics unless each was answered 200 all the time: by the proxies, then by the control planes.
#[track_caller]
fn assert_all_passed(used: Vec<Load>) {
    let statuses: Vec<_> = used.into_iter().map(|load| load.stop().statuses).collect();
    assert!(statuses.iter().all(|all| all.keys().eq([&200])), "{statuses:?}");
}

fn goes_on(algorithm: &str) {
    let two = Two::start(&format!("[secrets]\nalgorithm = \"{algorithm}\"\n"));
    let (here, there) = two.apis();
    let mut workers = two.workers();
    let mut keys = vec![here.issue("basic"), there.issue("basic")];
    let used = two.uses(&keys);
    for (begins, other) in [(&here, &there), (&there, &here)] {
        let old = active(begins);
        let kid = rotated(begins);
        // Nobody hears of the secret before both proxies know it, so its keys are good at once.
        keys.push(begins.issue("basic"));
        assert_eq!(kid_of(&keys[keys.len() - 1]), kid);
        assert_all_answer(&mut workers, &keys[keys.len() - 1], 200);
        wait_until(SOON, "the other one to sign with it", || active(other) == kid);
        keys.push(other.issue("basic"));
        assert_eq!(kid_of(&keys[keys.len() - 1]), kid);
        for key in &keys {
            assert_all_answer(&mut workers, key, 200);
        }
        for api in [begins, other] {
            assert_eq!(the_one_active(&status(api)), kid);
            assert_eq!(stage(api, &old), "previous");
        }
    }
    for (control_plane, api) in [(&two.stack.control_plane, &here), (&two.other, &there)] {
        wait_tidy(control_plane, api);
    }
    assert_all_passed(used);
}

#[test]
fn whichever_begins_it_both_sign_with_the_new_secret_and_all_keys_pass_at_both() {
    goes_on("ES256");
}

#[test]
fn an_hmac_secret_reaches_the_other_one_too() {
    goes_on("HS256");
}

#[test]
fn it_waits_for_the_proxies_of_the_other_one() {
    let mut two = Two::start("");
    let (here, there) = two.apis();
    let mut workers = two.workers();
    for begins in [&here, &there] {
        two.line.cut();
        let old = active(begins);
        let kid = text(&begin(begins, &json!({ "propagation_timeout": "1s" }))["version_id"]);
        wait_until(SOON, "it to take too long", || status(begins)["rotation"]["stalled"] == true);
        wait_until(SOON, "each to know whom it waits for", || {
            let waits_for = |api: &Api| status(api)["rotation"]["waiting_for"].clone();
            let theirs = waits_for(&here);
            let named = theirs.as_array().is_some_and(|all| all.len() == 1)
                && theirs[0].as_str().is_some_and(|one| one.starts_with("control plane "));
            named && waits_for(&there) == json!(["envoy-b"])
        });
        for api in [&here, &there] {
            assert_eq!((active(api), stage(api, &kid)), (old.clone(), "rotating".into()));
            assert_all_answer(&mut workers, &api.issue("basic"), 200);
        }
        two.line.heal();
        wait_until(SOON, "it to go on", || active(&here) == kid && active(&there) == kid);
        for api in [&here, &there] {
            let key = api.issue("basic");
            assert_eq!(kid_of(&key), kid);
            assert_all_answer(&mut workers, &key, 200);
        }
    }
}

#[test]
fn both_are_asked_at_once_and_one_begins() {
    let two = Two::start("");
    let (here, there) = two.apis();
    for _ in 0..3 {
        let before = status(&here)["versions"].as_array().map_or(0, Vec::len);
        let begun = keygate_e2e::wait_for(SOON, "the moment after the one before to be over", || {
            let answers = at_once(16, |caller| [&here, &there][caller % 2].post(ROTATE, &json!({})));
            let (begun, refused): (Vec<_>, Vec<_>) =
                answers.into_iter().partition(|answer| answer.status == 202);
            assert!(begun.len() <= 1, "{begun:?}");
            for answer in refused {
                answer.expect_problem(409, "rotation_in_progress");
            }
            begun.first().map(Response::json)
        });
        let kid = text(&begun["version_id"]);
        wait_until(SOON, "both to sign with it", || active(&here) == kid && active(&there) == kid);
        for api in [&here, &there] {
            assert_eq!(status(api)["versions"].as_array().map(Vec::len), Some(before + 1));
        }
    }
}

#[test]
fn when_the_one_that_began_it_is_killed_the_other_one_completes_it() {
    let mut two = Two::start("");
    let (here, there) = two.apis();
    let mut workers = two.workers();
    two.line.cut();
    let kid = text(&begin(&here, &json!({}))["version_id"]);
    wait_until(SOON, "the other one to wait for its own proxy alone", || {
        status(&there)["rotation"]["waiting_for"] == json!(["envoy-b"])
    });
    two.stack.control_plane.kill();
    two.line.heal();
    // It has to find out first that the other one is gone.
    wait_until(2 * SOON, "the other one to complete it", || active(&there) == kid);
    let key = there.issue("basic");
    assert_eq!(kid_of(&key), kid);
    assert_all_answer(&mut workers, &key, 200);
    two.stack.control_plane.start();
    wait_until(SOON, "the first one to hear of it", || active(&here) == kid);
    for api in [&here, &there] {
        assert_eq!(the_one_active(&status(api)), kid);
    }
    assert_all_answer(&mut workers, &here.issue("basic"), 200);
}

#[test]
fn an_immediate_rotation_ends_the_old_secret_at_both() {
    let two = Two::start("");
    let (here, there) = two.apis();
    // The admin's key is of a secret that is not ended below.
    rotated(&here);
    let mut workers = two.workers();
    for begins in [&here, &there] {
        wait_until(SOON, "both to sign with one secret", || active(&here) == active(&there));
        let old = [here.issue("basic"), there.issue("basic")];
        let kid = text(&begin(begins, &json!({ "immediate": true }))["version_id"]);
        let key = begins.issue("basic");
        assert_eq!(kid_of(&key), kid);
        assert_all_answer(&mut workers, &key, 200);
        for key in &old {
            assert_all_answer(&mut workers, key, 401);
        }
        wait_until(SOON, "the other one to sign with it", || active(&here) == kid && active(&there) == kid);
        for api in [&here, &there] {
            assert_all_answer(&mut workers, &api.issue("basic"), 200);
        }
    }
}

/// Waits until both say that one and the same secret signs, and that no rotation is under way; which.
#[track_caller]
fn wait_agreed(here: &Api, there: &Api) -> String {
    keygate_e2e::wait_for(SOON, "both to sign with one secret", || {
        let (ours, theirs) = (status(here), status(there));
        let stages = |status: &serde_json::Value| {
            let versions = status["versions"].as_array().expect("versions");
            let mut all: Vec<_> =
                versions.iter().map(|v| (v["version_id"].to_string(), v["state"].to_string())).collect();
            all.sort();
            all
        };
        let over = ours["rotation"].is_null() && theirs["rotation"].is_null();
        (over && stages(&ours) == stages(&theirs)).then(|| {
            assert_eq!(the_one_active(&ours), the_one_active(&theirs));
            the_one_active(&ours)
        })
    })
}

#[test]
fn begun_on_both_sides_of_a_split_both_agree_on_one_when_it_heals() {
    let mut two = Two::start("");
    let (here, there) = two.apis();
    let mut workers = two.workers();
    let old = active(&here);
    two.to_redis.iter_mut().for_each(Line::cut);
    let begun = [&here, &there].map(|api| {
        let kid = text(&begin(api, &json!({ "propagation_timeout": "1s" }))["version_id"]);
        wait_until(2 * SOON, "it to take too long", || status(api)["rotation"]["stalled"] == true);
        kid
    });
    for api in [&here, &there] {
        assert_eq!(active(api), old, "nobody knows whether the other one's proxies know it");
        assert_all_answer(&mut workers, &api.issue("basic"), 200);
    }
    two.to_redis.iter_mut().for_each(Line::heal);
    wait_until(2 * SOON, "one of them to sign", || begun.contains(&active(&here)));
    let kid = wait_agreed(&here, &there);
    let given_up = begun.iter().find(|begun| **begun != kid).expect("the other one");
    // It was given up, or, if its own side was back first, had its turn before this one.
    assert!(["expired", "previous"].contains(&stage(&here, given_up).as_str()), "{}", stage(&here, given_up));
    assert_eq!(stage(&here, &old), "previous");
    for api in [&here, &there] {
        let key = api.issue("basic");
        assert_eq!(kid_of(&key), kid);
        assert_all_answer(&mut workers, &key, 200);
    }
}

/// `first`: whose line is whole before the other one's, if one is.
fn forced_on_both_sides(algorithm: &str, first: Option<usize>) {
    let mut two = Two::start("");
    let (here, there) = two.apis();
    let body = json!({ "algorithm": algorithm });
    let old = rotated_with(&here, &body);
    wait_until(SOON, "the other one to sign with it, too", || active(&there) == old);
    two.to_redis.iter_mut().for_each(Line::cut);
    let mut keys = vec![here.issue("basic"), there.issue("basic")];
    let mut workers = two.workers();
    let used = two.uses(&keys);
    for (api, envoy) in [(&here, &two.stack.envoy), (&there, &two.envoy)] {
        let kid = text(&begin(api, &body)["version_id"]);
        api.post(FORCE, &json!({ "justification": "they are split" })).expect(200);
        let key = api.issue("basic");
        assert_eq!(kid_of(&key), kid);
        wait_until(SOON, "its own proxy to know it", || envoy.call(&chat(&key)).status == 200);
        keys.push(key);
    }
    if let Some(first) = first {
        two.to_redis[first].heal();
        wait_until(SOON, "the first to have told Redis all", || {
            two.redis.cli(&["GET", &format!("jwt_version:{}", kid_of(&keys[2 + first]))]).contains("active")
        });
    }
    two.to_redis.iter_mut().for_each(Line::heal);
    wait_until(2 * SOON, "each to know the other's secret", || {
        [&here, &there].iter().all(|api| {
            let all = status(api)["versions"].to_string();
            keys.iter().all(|key| all.contains(&kid_of(key)))
        })
    });
    let kid = wait_agreed(&here, &there);
    assert!(keys[2..].iter().any(|key| kid_of(key) == kid));
    let all_pass = try_wait_for(SOON, || {
        let mut passes = |key: &Key| workers.iter_mut().all(|worker| worker.send(&chat(key)).status == 200);
        keys.iter().all(&mut passes).then_some(())
    });
    let versions = |api: &Api| status(api)["versions"].clone();
    assert!(all_pass.is_some(), "keys are refused for good: {:#} {:#}", versions(&here), versions(&there));
    for (control_plane, api) in [(&two.stack.control_plane, &here), (&two.other, &there)] {
        assert_all_answer(&mut workers, &api.issue("basic"), 200);
        wait_tidy(control_plane, api);
    }
    // And on it goes.
    let next = rotated(&there);
    wait_until(SOON, "both to sign with the next one", || active(&here) == next);
    keys.push(here.issue("basic"));
    for key in &keys {
        assert_all_answer(&mut workers, key, 200);
    }
    assert_all_passed(used);
}

#[test]
fn forced_on_both_sides_of_a_split_one_signs_when_it_heals_and_the_keys_of_both_pass() {
    forced_on_both_sides("ES256", None);
}

#[test]
fn forced_on_both_sides_of_a_split_with_hmac_secrets_of_which_the_earlier_one_comes_back_first() {
    forced_on_both_sides("HS256", Some(0));
}

#[test]
fn forced_on_both_sides_of_a_split_with_hmac_secrets_of_which_the_later_one_comes_back_first() {
    forced_on_both_sides("HS256", Some(1));
}

#[test]
fn forced_on_both_sides_of_a_split_with_hmac_secrets_that_come_back_at_once() {
    forced_on_both_sides("HS256", None);
}

#[test]
fn a_secret_that_redis_lost_before_the_other_one_had_it_is_written_again() {
    let mut two = Two::start("");
    let (here, there) = two.apis();
    let mut workers = two.workers();
    two.to_redis[1].cut();
    let kid = text(&begin(&here, &json!({ "algorithm": "HS256" }))["version_id"]);
    here.post(FORCE, &json!({ "justification": "the other one is away" })).expect(200);
    let key = here.issue("basic");
    let sealed = format!("jwt_secret:{kid}");
    wait_until(SOON, "Redis to have it", || two.redis.cli(&["GET", &sealed]).contains("active"));
    assert_eq!(two.redis.cli(&["DEL", &sealed]).trim(), "1");
    two.to_redis[1].heal();
    wait_until(SOON, "the other one to sign with it", || active(&there) == kid);
    wait_until(SOON, "the other one to open it", || status(&there)["active"]["open"] == true);
    let theirs = there.issue("basic");
    assert_eq!(kid_of(&theirs), kid);
    for key in [&key, &theirs] {
        assert_all_answer(&mut workers, key, 200);
    }
}

#[test]
fn a_control_plane_that_ended_in_good_order_delays_no_rotation() {
    let redis = Redis::start();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let mut other = ControlPlane::beside(&stack.control_plane, &stack.directory().join("b"));
    other.use_redis(&redis.url());
    other.start();
    let (here, there) = (stack.api(), Api::new(other.api_port(), &stack.control_plane.admin_key()));
    wait_until(SOON, "both to sign with one secret", || {
        there.get("/api/admin/emergency").status == 200 && active(&here) == active(&there)
    });
    // Its proxy goes over to the first one, as behind a load balancer; another one stays away.
    let mut moved = stack.another_envoy_of(&other, "envoy-b", 1);
    moved.stop();
    other.stop();

    let answer = here.post(ROTATE, &json!({ "immediate": true, "reason": "leaked" })).expect(202).json();
    let here = here.with_key(answer["api_key"].as_str().unwrap_or(&here.key()));
    let begun = std::time::Instant::now();
    let mut said = String::new();
    let issued = || here.post("/api/auth/register", &json!({ "name": "n", "role": "basic" }));
    // The proxy that it left was there until a moment ago, and may serve with the old secret.
    wait_until(SOON, "what is waited for to be said", || {
        said = here.get("/readyz?verbose").text();
        said.contains("no key can be issued until the new secret is known to control plane")
    });
    println!("{said}");
    // It comes over.
    let _envoy = stack.another_envoy("envoy-b", 1);
    wait_until(SOON, "keys to be issued", || issued().status == 201);
    println!("keys are issued after {} ms", begun.elapsed().as_millis());
}

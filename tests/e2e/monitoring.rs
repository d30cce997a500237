//! Rules, dashboard and configurations of `monitoring/`, against the tools they are for and against a Keygate that runs:
//! what is asked for is there, and what shall wake somebody does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use keygate_core::decide::Reason;
use keygate_e2e::prometheus::{self, Prometheus, metrics_in};
use keygate_e2e::wait::try_wait_for;
use keygate_e2e::{Api, Key, Redis, Request, SOON, Stack, binaries, wait_until};
use serde_json::{Value, json};

/// Metrics of expressions that are not there yet.
const MISSING: [&str; 0] = [];
/// What Prometheus makes by itself, once an alert is there.
const OF_PROMETHEUS: [&str; 1] = ["ALERTS"];
/// What `promtool check metrics` says of the name that the playbook asks for.
const CONTRACT: &str = "secret_rotation_failures counter metrics should have \"_total\" suffix";

fn output(program: &Path, arguments: &[&str], files: &[PathBuf]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).args(files).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// All that it says, which is printed if it does not succeed.
#[track_caller]
fn succeeds(program: &Path, arguments: &[&str], files: &[PathBuf]) -> String {
    let output = output(program, arguments, files);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

fn dashboard() -> Value {
    let path = prometheus::monitoring().join("grafana/dashboards/keygate.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// All panels, those in closed rows too.
fn panels(dashboard: &Value) -> Vec<&Value> {
    let top = dashboard["panels"].as_array().expect("panels").iter();
    top.flat_map(|panel| std::iter::once(panel).chain(panel["panels"].as_array().into_iter().flatten()))
        .collect()
}

/// The expressions of the dashboard's panels, as Grafana would send them.
fn panel_expressions(dashboard: &Value) -> Vec<(String, String)> {
    let panels = panels(dashboard);
    let of = |panel: &Value| {
        let title = panel["title"].as_str().unwrap_or_default().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (title.clone(), as_sent(&target["expr"]))).collect::<Vec<_>>()
    };
    panels.into_iter().flat_map(of).collect()
}

fn as_sent(expression: &Value) -> String {
    let expression = expression.as_str().unwrap_or_default();
    expression.replace("$__rate_interval", "1m").replace("$proxy", ".*")
}

#[test]
fn promtool_and_amtool_are_content() {
    let (promtool, amtool, at) = (binaries::promtool(), binaries::amtool(), prometheus::monitoring());
    succeeds(&promtool, &["check", "rules", "--lint=all", "--lint-fatal"], &prometheus::rules());
    succeeds(&promtool, &["check", "config"], &[at.join("prometheus.yml")]);
    succeeds(&promtool, &["test", "rules"], &prometheus::rule_tests());
    succeeds(&amtool, &["check-config"], &[at.join("alertmanager.yml")]);
    let routed = |severity: &str| {
        let file = format!("--config.file={}", at.join("alertmanager.yml").display());
        let severity = format!("severity={severity}");
        let output = output(&amtool, &["config", "routes", "test", &file, &severity], &[]);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(routed("critical"), "pagerduty,slack");
    assert_eq!(routed("warning"), "slack");
}

#[test]
fn promtool_has_nothing_to_say_of_the_metrics_but_a_name_that_is_a_contract() {
    let stack = Stack::builder().without_envoy().start();
    let file = stack.directory().join("metrics");
    fs::write(&file, &stack.api().get("/metrics").expect(200).body).expect("a file");
    let output = Command::new(binaries::promtool())
        .args(["check", "metrics"])
        .stdin(fs::File::open(file).expect("the file"))
        .output()
        .expect("promtool runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert_eq!(said.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>(), [CONTRACT]);
}

#[test]
fn the_dashboard_is_one_that_grafana_reads() {
    let dashboard = dashboard();
    assert_eq!(dashboard["uid"], "keygate");
    assert!(dashboard["schemaVersion"].as_u64() >= Some(39), "of Grafana 11 or newer");
    let provisioned = prometheus::monitoring().join("grafana/provisioning/datasources/keygate.yml");
    let provisioned = fs::read_to_string(provisioned).expect("the data source");
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let current = variables.iter().find(|one| one["name"] == "datasource").expect("the data source's");
    let uid = current["current"]["value"].as_str().expect("a uid");
    assert!(provisioned.contains(&format!("uid: {uid}\n")), "the one that is provisioned is preset");

    let (mut ids, mut taken) = (BTreeSet::new(), BTreeMap::new());
    for panel in panels(&dashboard) {
        let title = panel["title"].as_str().unwrap_or_else(|| panic!("no title: {panel}"));
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}: its id is another one's");
        let place =
            |what: &str| panel["gridPos"][what].as_u64().unwrap_or_else(|| panic!("{title}: no {what}"));
        assert!(place("x") + place("w") <= 24, "{title} is too wide");
        for cell in (place("x")..place("x") + place("w"))
            .flat_map(|x| (place("y")..place("y") + place("h")).map(move |y| (x, y)))
        {
            let other = taken.insert(cell, title);
            assert_eq!(other, None, "{title} lies on another one");
        }
        let targets = panel["targets"].as_array().map_or(0, Vec::len);
        if panel["type"] == "row" {
            assert_eq!(targets, 0, "{title}");
            continue;
        }
        assert!(targets > 0, "{title} shows nothing");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let mut letters = BTreeSet::new();
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert!(letters.insert(target["refId"].as_str().expect("a refId")), "{title}: {target}");
            assert!(!as_sent(&target["expr"]).contains('$'), "{title}: a variable that is none: {target}");
        }
    }
}

#[test]
fn each_alert_says_what_to_do_and_has_a_runbook_and_a_test() {
    let directory = tempfile::tempdir().expect("a directory");
    let prometheus = Prometheus::start(directory.path(), &[], &[], str::to_owned);
    let runbooks = fs::read_to_string(binaries::root().join("docs/runbooks.md")).expect("the runbooks");
    let mut sections: BTreeSet<&str> =
        runbooks.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let tests: String = prometheus::rule_tests()
        .iter()
        .map(|path| fs::read_to_string(path).expect("the tests of rules"))
        .collect();

    let rules = prometheus.rules();
    for rule in rules.iter().filter(|rule| rule["type"] == "recording") {
        let name = rule["name"].as_str().expect("a name");
        assert!(tests.contains(name), "{name} has no test");
    }
    for rule in rules.iter().filter(|rule| rule["type"] == "alerting") {
        let name = rule["name"].as_str().expect("a name");
        let severity = rule["labels"]["severity"].as_str().unwrap_or_default();
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
        for annotation in ["summary", "description"] {
            let text = rule["annotations"][annotation].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "{name} has no {annotation}");
        }
        let url = rule["annotations"]["runbook_url"].as_str().unwrap_or_default();
        let wanted = format!(
            "{{{{ with $externalLabels.runbooks }}}}{{{{ . }}}}{{{{ else }}}}docs/runbooks.md{{{{ end }}}}#{}",
            name.to_lowercase()
        );
        assert_eq!(url, wanted, "{name}");
        assert!(sections.remove(name), "{name} has no runbook");
        let fires = format!("alertname=\"{name}\",alertstate=\"firing\",severity=\"{severity}\"");
        assert!(tests.contains(&fires), "no test sees {name} fire");
    }
    assert!(sections.is_empty(), "runbooks of no alert: {sections:?}");
    for playbooks in [
        "APIKeyValidationFailureHigh",
        "RedisConnectionLost",
        "JWTSecretRotationFailed",
        "HighRefreshFailureRate",
        "RateLimitViolationsHigh",
    ] {
        assert!(rules.iter().any(|rule| rule["name"] == playbooks), "{playbooks} is gone");
    }
    // Links within it lead somewhere.
    for link in runbooks.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
        let has_it = |line: &str| line.strip_prefix("### ").is_some_and(|name| name.to_lowercase() == link);
        assert!(runbooks.lines().any(has_it), "#{link}");
    }
}

/// What happens in a day, of everything some.
struct Day {
    api: Api,
    good: Key,
    other: Key,
}

impl Day {
    fn of(stack: &Stack) -> Self {
        let api = stack.api();
        Self { good: api.issue("contributor"), other: api.issue("basic"), api }
    }

    fn passes(&self, stack: &Stack, redis: &Redis) {
        let api = &self.api;
        stack.get("/api/chat", &self.good.token).expect(200);
        stack.get("/api/dataset", &self.other.token).expect(403);
        stack.get("/api/chat", "no.key.atall").expect(401);
        stack.call(&Request::get("/")).expect(200);
        stack.call(&Request::get("/nowhere")).expect(403);
        let with = |token: &str, request: Request| api.call(&request.bearer(token));
        with(&self.good.token, Request::get("/api/auth/validate")).expect(200);
        with("no.key.atall", Request::get("/api/auth/validate")).expect(401);
        let renew = || Request::post("/api/auth/refresh", &json!({}));
        with(&self.other.token, renew()).expect(400);
        let short = api.issue_with(&json!({ "name": "short", "role": "basic", "expires_in": "1h" }));
        let renewed = Key::from_answer(&with(&short.token, renew()).expect(200).json());
        api.revoke(&renewed.id);
        redis.cli(&["SET", "emergency_revocation", "not even JSON"]);
        api.post("/api/admin/canary/run", &json!({})).expect(200);
    }
}

#[test]
fn every_reason_is_in_the_scrape_of_a_real_envoy_and_those_of_503_are_unavailability() {
    let stack = Stack::builder().workers(1).start();
    stack.call(&Request::get("/")).expect(200);
    let scrape = || stack.envoy.admin("/stats/prometheus").expect(200).text();
    wait_until(SOON, "the first decision to be counted", || scrape().contains("reason=\"public\"} 1"));
    let scrape = scrape();
    for reason in Reason::ALL {
        let series = format!("keygate_decisions_total{{reason=\"{}\"}} ", reason.label());
        assert!(scrape.lines().any(|line| line.starts_with(&series)), "no {series}in\n{scrape}");
    }
    // A 503 of the filter's own is no refusal that a key deserves.
    let unavailable: BTreeSet<&str> = Reason::ALL
        .iter()
        .filter(|reason| reason.refusal().is_some_and(|refusal| refusal.status() == 503))
        .map(|reason| reason.label())
        .collect();
    let rules =
        prometheus::rules().iter().map(|path| fs::read_to_string(path).expect("rules")).collect::<String>();
    let mut seen = 0;
    for part in rules.split("keygate_decisions_total{reason").skip(1) {
        let Some(named) = part.split('"').nth(1).filter(|named| named.contains("no_state")) else { continue };
        assert_eq!(named.split('|').collect::<BTreeSet<_>>(), unavailable, "{named}");
        seen += 1;
    }
    assert!(seen >= 2, "{seen}");
}

/// The selectors of an expression that name labels: `name{label="value"}`.
fn selectors(expression: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = BTreeSet::new();
    for (at, _) in expression.match_indices('{') {
        let begin = expression[..at].rfind(|c| !is_name(c)).map_or(0, |before| before + 1);
        let end = expression[at..].find('}').expect("a closing brace") + at;
        if begin < at {
            found.insert(expression[begin..=end].to_owned());
        }
    }
    found
}

#[test]
fn every_expression_has_data_after_a_day_and_asks_for_what_is_there() {
    let redis = Redis::start();
    let mut stack =
        Stack::builder().workers(2).redis(&redis.url()).without_control_plane().without_envoy().start();
    let config =
        format!("[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1s\"\n", stack.envoy.port());
    fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let prometheus = Prometheus::start(
        stack.directory(),
        &[stack.control_plane.api_port()],
        &[stack.envoy.admin_port()],
        str::to_owned,
    );

    let dashboard = dashboard();
    let rules = prometheus.rules();
    let queries = |of: &'static str| {
        let wanted = rules.iter().filter(move |rule| rule["type"] == of);
        wanted.map(|rule| (rule["name"].to_string(), rule["query"].as_str().expect("a query").to_owned()))
    };
    // An alert's is empty as long as all is well.
    let alerts: Vec<_> = queries("alerting").collect();
    let mut empty = panel_expressions(&dashboard);
    empty.extend(queries("recording"));
    assert!(alerts.len() > 30 && empty.len() > 80, "{} alerts, {} others", alerts.len(), empty.len());
    let asked_for: BTreeSet<String> =
        alerts.iter().chain(&empty).flat_map(|(_, query)| metrics_in(query)).collect();

    let day = Day::of(&stack);
    let all = try_wait_for(3 * SOON, || {
        day.passes(&stack, &redis);
        empty.retain(|(of, query)| {
            let result = prometheus.query(query).unwrap_or_else(|error| panic!("{of}: {query}: {error}"));
            result.is_empty() && metrics_in(query).iter().all(|name| !MISSING.contains(&name.as_str()))
        });
        empty.is_empty().then_some(())
    });
    assert!(all.is_some(), "there is no data for {empty:#?}");
    for (of, query) in &alerts {
        prometheus.query(query).unwrap_or_else(|error| panic!("{of}: {query}: {error}"));
    }
    // A label that no series has would keep an alert from ever firing.
    for (of, query) in &alerts {
        // Those of recorded series are made by the rules, once there is something to record.
        let is_scraped = |selector: &&String| !selector.starts_with("ALERTS{") && !selector.contains(':');
        for selector in selectors(query).iter().filter(is_scraped) {
            let series =
                prometheus.query(selector).unwrap_or_else(|error| panic!("{of}: {selector}: {error}"));
            assert!(!series.is_empty(), "{of}: nothing is {selector}");
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().into_iter().flatten() {
        if annotation["expr"].is_string() {
            prometheus.query(&as_sent(&annotation["expr"])).expect("an expression");
        }
    }

    let there = prometheus.names();
    let lacking: Vec<_> = asked_for
        .iter()
        .filter(|name| !there.contains(*name))
        .filter(|name| !MISSING.contains(&name.as_str()) && !OF_PROMETHEUS.contains(&name.as_str()))
        .collect();
    assert!(lacking.is_empty(), "asked for, and nowhere: {lacking:?}");
    for name in MISSING {
        assert!(!there.contains(name), "{name} is there: take it off the list");
    }
}

/// The names of the alerts that fire.
fn firing(prometheus: &Prometheus) -> BTreeSet<String> {
    let alerts = prometheus.firing();
    alerts.iter().map(|alert| alert["labels"]["alertname"].as_str().expect("a name").to_owned()).collect()
}

/// Waits until all of these have fired, at whatever moment, and looks at what somebody would read.
#[track_caller]
fn wait_fired(prometheus: &Prometheus, within: Duration, wanted: &[&str]) {
    let mut left: BTreeSet<&str> = wanted.iter().copied().collect();
    wait_until(within, &format!("{wanted:?} to fire"), || {
        for alert in prometheus.firing() {
            if left.remove(alert["labels"]["alertname"].as_str().unwrap_or_default()) {
                let read = alert["annotations"].to_string();
                assert!(!read.contains("error expanding") && !read.contains("<no value>"), "{read}");
                println!("fired: {alert}");
            }
        }
        left.is_empty()
    });
}

/// Waits until so many, Prometheus itself among them, were scraped twice: what rises before is not seen to rise.
#[track_caller]
fn wait_scraped(prometheus: &Prometheus, targets: usize) {
    wait_until(SOON, "all to be scraped twice", || {
        let scraped = prometheus.query("sum_over_time(up[1m]) >= 2 and up == 1");
        scraped.expect("an expression").len() == targets
    });
}

#[track_caller]
fn wait_resolved(prometheus: &Prometheus, within: Duration, wanted: &[&str]) {
    wait_until(within, &format!("{wanted:?} to resolve"), || {
        let firing = firing(prometheus);
        wanted.iter().all(|name| !firing.contains(*name))
    });
}

/// A shipped text with one place of it changed, which must be there if `within` is.
fn changed(text: &str, within: &str, from: &str, to: &str) -> String {
    if !text.contains(within) {
        return text.to_owned();
    }
    assert!(text.contains(from), "{from} is not in the rules any more");
    text.replace(from, to)
}

#[test]
fn a_proxy_that_is_cut_off_and_a_rotation_that_waits_for_it_fire_and_resolve() {
    const ALERTS: [&str; 4] = [
        "KeygateProxiesBehind",
        "KeygateProxyOutOfTouch",
        "KeygateRotationStalled",
        "JWTSecretRotationFailed",
    ];
    // A proxy in touch is then never older than some 9 s.
    let stack = Stack::builder()
        .workers(1)
        .config("[fleet]\nmax_staleness = \"20s\"\n[secrets]\npropagation_timeout = \"1s\"\n")
        .start();
    let (other, mut line) = stack.another_envoy_on_a_line("envoy-2", 1);
    let prometheus = Prometheus::start(
        stack.directory(),
        &[stack.control_plane.api_port()],
        &[stack.envoy.admin_port(), other.admin_port()],
        |text| {
            let text = changed(
                text,
                "KeygateProxyOutOfTouch",
                "keygate_state_age_seconds >= 60",
                "keygate_state_age_seconds >= 12",
            );
            let text = changed(
                &text,
                "KeygateProxiesBehind",
                "keygate_fleet_lag_seconds > 120",
                "keygate_fleet_lag_seconds > 1",
            );
            let text = changed(
                &text,
                "KeygateRotationStalled",
                "state=\"rotating\"} > 900",
                "state=\"rotating\"} > 1",
            );
            changed(
                &text,
                "JWTSecretRotationFailed",
                "secret_rotation_failures[1h]",
                "secret_rotation_failures[10s]",
            )
        },
    );
    wait_scraped(&prometheus, 4);
    wait_resolved(&prometheus, SOON, &ALERTS); // Before the first scrape nobody is there.

    line.cut();
    stack.api().post("/api/admin/secrets/rotate", &json!({})).expect(202);
    wait_fired(&prometheus, 2 * SOON, &ALERTS);
    line.heal();
    wait_resolved(&prometheus, 2 * SOON, &ALERTS);
}

#[test]
fn what_is_lost_or_broken_fires_and_resolves() {
    const ALERTS: [&str; 4] = [
        "KeygateFilterRestarts",
        "KeygateRedisEditRefused",
        "RedisConnectionLost",
        "KeygateControlPlaneDown",
    ];
    let mut redis = Redis::start();
    let mut stack = Stack::builder().workers(1).trap_filter().redis(&redis.url()).start();
    let good = stack.api().issue("basic");
    let prometheus = Prometheus::start(
        stack.directory(),
        &[stack.control_plane.api_port()],
        &[stack.envoy.admin_port()],
        |text| changed(text, "KeygateFilterRestarts", "[10m]) > 0", "[10s]) > 0"),
    );
    wait_scraped(&prometheus, 3);
    wait_resolved(&prometheus, SOON, &ALERTS); // Before the first scrape nobody is there.

    stack.call(&Request::get("/api/chat").bearer(&good.token).header("x-trap", "worker")).expect(503);
    wait_until(SOON, "the VM to be made anew", || stack.get("/api/chat", &good.token).status == 200);
    redis.cli(&["SET", "emergency_revocation", "not even JSON"]);
    wait_fired(&prometheus, SOON, &["KeygateFilterRestarts", "KeygateRedisEditRefused"]);
    redis.kill();
    wait_fired(&prometheus, SOON, &["RedisConnectionLost"]);
    redis.run();
    wait_resolved(&prometheus, 2 * SOON, &ALERTS);

    stack.control_plane.kill();
    wait_fired(&prometheus, SOON, &["KeygateControlPlaneDown"]);
    stack.control_plane.start();
    wait_resolved(&prometheus, SOON, &ALERTS);
}

#[test]
fn a_canary_that_is_broken_fires_and_resolves() {
    const ALERTS: [&str; 2] = ["KeygateCanaryFailing", "KeygateCanaryUnhealthy"];
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let config =
        format!("[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1s\"\n", stack.envoy.port());
    fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let prometheus =
        Prometheus::start(stack.directory(), &[stack.control_plane.api_port()], &[], str::to_owned);
    wait_scraped(&prometheus, 2);
    let api = stack.api();
    let status = || api.get("/api/admin/canary/health").expect(200).json()["status"].clone();
    wait_until(SOON, "it to be healthy", || status() == "healthy");
    wait_resolved(&prometheus, SOON, &ALERTS);

    stack.envoy.kill();
    wait_fired(&prometheus, 2 * SOON, &ALERTS);
    stack.start_envoy();
    wait_resolved(&prometheus, SOON, &["KeygateCanaryFailing"]);
    // Four of five of the last five minutes have to pass first.
    wait_resolved(&prometheus, 4 * SOON, &ALERTS);
}

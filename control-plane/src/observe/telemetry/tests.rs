use std::collections::BTreeMap;

use super::*;
use crate::observe::metrics::Metrics;

fn telemetry(dir: &Path) -> Arc<Telemetry> {
    let roles = crate::model::roles::expand(crate::model::roles::defaults());
    Arc::new(Telemetry::open(dir, roles.keys().cloned().collect()).unwrap())
}

fn text(telemetry: &Arc<Telemetry>) -> String {
    let metrics = Metrics::new(&crate::model::roles::expand(crate::model::roles::defaults()));
    metrics.export(Arc::clone(telemetry));
    metrics.text()
}

fn policy() -> Policy {
    serde_json::from_str(r#"{"routes":[{"name":"chat","path":"/chat","access":"key"}]}"#).unwrap()
}

fn report(incarnation: &str, counts: &[(&str, u64, u64)]) -> Report {
    let counts = counts.iter().map(|(name, before, now)| ((*name).to_owned(), (*before, *now)));
    Report { format: 1, proxy: "edge".into(), incarnation: incarnation.into(), counts: counts.collect() }
}

fn value(telemetry: &Arc<Telemetry>, series: &str) -> u64 {
    let text = text(telemetry);
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is missing")).parse().unwrap()
}

const ALLOWED: &str = "decision allowed chat basic";
const PASSED: &str = "keygate_requests_total{endpoint=\"chat\",outcome=\"passed\",version=\"v2\"}";

/// Counts a report and writes it, as the two tasks do.
async fn take(telemetry: &Telemetry, report: &Report) {
    let policy = policy();
    let taken = telemetry.take(report, &policy, 100);
    let written = async {
        telemetry.news.notified().await;
        assert!(telemetry.write(100).await);
    };
    let (taken, ()) = tokio::join!(taken, written);
    taken.unwrap();
}

#[tokio::test]
async fn a_report_that_comes_again_counts_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    for _ in 0..3 {
        take(&telemetry, &report("a", &[(ALLOWED, 0, 5)])).await;
    }
    take(&telemetry, &report("a", &[(ALLOWED, 5, 7)])).await;
    take(&telemetry, &report("a", &[(ALLOWED, 0, 6)])).await; // Of a leader that had stalled.
    assert_eq!(value(&telemetry, PASSED), 7);
    let validated = "api_key_validated_total{result=\"success\",role=\"basic\",version=\"v2\"}";
    assert_eq!(value(&telemetry, validated), 7);
}

#[tokio::test]
async fn what_another_control_plane_has_counted_does_not_count_here() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    take(&telemetry, &report("a", &[(ALLOWED, 90, 100)])).await;
    assert_eq!(value(&telemetry, PASSED), 10);
    // It was there again meanwhile, and is back.
    take(&telemetry, &report("a", &[(ALLOWED, 150, 151)])).await;
    assert_eq!(value(&telemetry, PASSED), 11);
}

#[tokio::test]
async fn a_restarted_proxy_begins_with_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    take(&telemetry, &report("a", &[(ALLOWED, 0, 5)])).await;
    take(&telemetry, &report("b", &[(ALLOWED, 0, 2)])).await;
    assert_eq!(value(&telemetry, PASSED), 7);
}

#[tokio::test]
async fn totals_outlive_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let counts = [
        (ALLOWED, 0, 5),
        ("decision revoked chat basic", 0, 2),
        ("decision rate_limited chat basic", 0, 3),
        ("decision no_route  ", 0, 1),
        ("time validation 3", 0, 4),
        ("time validation sum", 0, 30_000),
    ];
    {
        let telemetry = telemetry(dir.path());
        telemetry.key_validated("basic", true);
        telemetry.observe(Timing::Validation, Duration::from_millis(1));
        take(&telemetry, &report("a", &counts)).await;
    }
    let telemetry = telemetry(dir.path());
    take(&telemetry, &report("a", &counts)).await;
    for (series, wanted) in [
        (PASSED, 5),
        ("keygate_requests_total{endpoint=\"chat\",outcome=\"refused\",version=\"v2\"}", 5),
        ("keygate_requests_total{endpoint=\"none\",outcome=\"refused\",version=\"v2\"}", 1),
        ("auth_errors_total{error_type=\"revoked\",version=\"v2\"}", 2),
        ("auth_errors_total{error_type=\"no_route\",version=\"v2\"}", 1),
        ("api_key_validated_total{result=\"failure\",role=\"basic\",version=\"v2\"}", 2),
        ("api_key_validated_total{result=\"limited\",role=\"basic\",version=\"v2\"}", 3),
        ("key_validation_duration_seconds_bucket{version=\"v2\",le=\"0.00001\"}", 4),
        ("key_validation_duration_seconds_count{version=\"v2\"}", 5),
        ("jwt_decode_duration_seconds_count", 0),
        ("api_key_validated_total{result=\"success\",role=\"basic\",version=\"v2\"}", 6),
    ] {
        assert_eq!(value(&telemetry, series), wanted, "{series}");
    }
}

#[tokio::test]
async fn what_is_not_on_disk_is_not_acknowledged_and_not_counted_twice() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    let report = report("a", &[(ALLOWED, 0, 5)]);
    assert!(telemetry.count(&report, &policy(), 100).is_ok());
    // It dies here: the numbers are counted and not on disk.
    drop(telemetry);
    let telemetry = self::telemetry(dir.path());
    take(&telemetry, &report).await;
    assert_eq!(value(&telemetry, PASSED), 5);
}

#[tokio::test]
async fn what_is_not_on_disk_is_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    let malformed = "auth_errors_total{error_type=\"malformed\",version=\"v2\"}";
    telemetry.request_refused(Reason::Malformed);
    telemetry.count(&report("a", &[("decision malformed chat ", 0, 5)]), &policy(), 100).unwrap();
    assert_eq!(value(&telemetry, malformed), 0);
    assert!(telemetry.write(100).await);
    assert_eq!(value(&telemetry, malformed), 6);
}

#[tokio::test]
async fn names_that_nobody_knows_make_no_series() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    telemetry.note_routes(&policy());
    let before = text(&telemetry).lines().count();
    let mut counts = BTreeMap::new();
    for number in 0..1_000 {
        counts.insert(format!("decision revoked route-{number} role-{number}"), (0, 1));
        counts.insert(format!("another {number}"), (0, 1));
    }
    let report = Report { counts, ..report("a", &[]) };
    take(&telemetry, &report).await;
    // One for each outcome at the route that is not known.
    assert!(text(&telemetry).lines().count() <= before + 3);
    let other = "keygate_requests_total{endpoint=\"other\",outcome=\"refused\",version=\"v2\"}";
    assert_eq!(value(&telemetry, other), 1_000);
}

#[tokio::test]
async fn a_report_that_cannot_be_right_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let telemetry = telemetry(dir.path());
    let many = (0..=MAX_REPORTED).map(|number| (format!("x {number}"), (0, 1))).collect();
    let long = "x".repeat(MAX_SERIES_BYTES + 1);
    for bad in [
        Report { counts: many, ..report("a", &[]) },
        report("a", &[(&long, 0, 1)]),
        report("a", &[(ALLOWED, 0, u64::MAX)]),
    ] {
        assert!(matches!(telemetry.count(&bad, &policy(), 0), Err(ReportError::Invalid(_))));
    }
    assert!(!text(&telemetry).contains("chat"), "nothing of it was counted");
}

#[tokio::test]
async fn a_broken_file_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("telemetry.redb"), b"not a database at all").unwrap();
    let telemetry = telemetry(dir.path());
    take(&telemetry, &report("a", &[(ALLOWED, 0, 5)])).await;
    assert!(dir.path().join("telemetry.redb.broken").exists());
}

#[test]
fn who_was_silent_for_a_month_is_forgotten() {
    let known = |heard_s| Known { heard_s, ..Known::default() };
    let mut kept = Kept {
        counts: Counts::default(),
        known: HashMap::from([("old".into(), known(0)), ("new".into(), known(FORGET_AFTER_S + 5))]),
        unwritten: BTreeSet::new(),
        routes_now: BTreeSet::new(),
        routes: BTreeSet::new(),
        reports: 0,
        reset: Default::default(),
        on_disk: Arc::default(),
        failures: 0,
    };
    assert_eq!(forget(&mut kept, FORGET_AFTER_S + 5), ["old"]);
    assert_eq!(kept.known.len(), 1);
}

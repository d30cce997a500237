//! Metrics. Every series exists from the start, with 0, so that alerts see a first event; labels come
//! from closed sets, never a key, path or owner.

use std::sync::Arc;
use std::time::Duration;

use keygate_core::decide::Reason;
use keygate_core::decide::policy::Policy;
use keygate_core::quota::SilentProxy;
use keygate_core::telemetry::Trouble;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts,
    Registry, TextEncoder,
};

use crate::canary::{Health, History};
use crate::fleet::Summary;
use crate::key::RevocationReason;
use crate::notify::{self, Destination};
use crate::roles::Roles;
use crate::rollout::Flags;
use crate::secret::{Ring, SecretState};
use crate::telemetry::{self, Shown, Times};

/// The version label: what was there before Keygate.
pub const V1: &str = "v1";
/// The version label: keys of Keygate.
pub const V2: &str = "v2";
/// Buckets from 10 µs to 100 ms, for what takes microseconds.
const MICROSECONDS: [f64; 13] =
    [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1];
/// Buckets from 1 ms to 10 s, for what crosses the network.
const MILLISECONDS: [f64; 13] =
    [1e-3, 2.5e-3, 5e-3, 1e-2, 1.5e-2, 2e-2, 5e-2, 1e-1, 2.5e-1, 5e-1, 1.0, 5.0, 10.0];

/// Gaps in what the ledger knows, and their consequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Doubts {
    /// Proxies that were not heard of for 3 s.
    pub silent: Vec<SilentProxy>,
    /// Time until limits grow again at proxies; 0: they do.
    pub recovers_in: Duration,
    /// Nothing is granted, since another control plane may keep the ledger.
    pub suspended: bool,
    /// Proxies that were released without a word since the ledger was opened.
    pub released_proxies: u64,
    /// Units granted to them that they had not reported as spent: as many may have been admitted once more.
    pub released_units: u64,
}

/// All metrics.
pub struct Metrics {
    registry: Registry,
    /// Keys issued.
    pub created: IntCounterVec,
    /// Keys validated by proxies and by `/api/auth/validate`.
    pub validated: IntCounterVec,
    /// Requests to proxies, by the route's name and what became of them.
    pub requests: IntCounterVec,
    /// Renewals, tried and done.
    pub refreshed: IntCounterVec,
    /// Keys revoked.
    pub revoked: IntCounterVec,
    /// Refused credentials by precise reason.
    pub auth_errors: IntCounterVec,
    /// Requests that proxies refused, by precise reason.
    pub refusals: IntCounterVec,
    /// Answers of an upstream that tell of trouble, while a rollout is under way.
    pub upstream_answers: IntCounterVec,
    /// The share of subjects that goes to V2.
    pub rollout_share: Gauge,
    /// The rollout's strategy.
    pub rollout_strategy: GaugeVec,
    /// Questions of proxies for units of limits.
    pub quota_questions: IntCounter,
    /// Whether nothing is leased of limits, since what was leased before is not known.
    pub quota_in_doubt: Gauge,
    /// Nothing is granted of limits.
    pub quota_suspended: Gauge,
    /// Proxies that the ledger does not hear.
    pub quota_silent: Gauge,
    /// Proxies that were released without a word.
    pub quota_released_proxies: IntCounter,
    /// Units that were released with them.
    pub quota_released_units: IntCounter,
    /// Whether the ledger of limits is kept here.
    pub quota_keeper: Gauge,
    /// Questions that did not get to the control plane that keeps it.
    pub quota_pass_on_failures: IntCounter,
    /// How often the guard rolled back.
    pub rollbacks: IntCounter,
    /// Time to decide on a key, from the request's headers to the answer.
    pub validation_seconds: Times,
    /// Time to read and verify the token in that, or to find it remembered.
    pub decode_seconds: Times,
    /// Those of the above that outlive the process, as they are shown.
    pub kept: Shown,
    /// Reports of proxies that could not be kept.
    pub telemetry_failures: IntCounter,
    /// Requests beyond a key's limit.
    pub rate_limit_exceeded: IntCounterVec,
    /// Rotations of signing secrets that failed.
    pub secret_rotation_failures: IntCounter,
    /// Rotations of signing secrets, and what became of them.
    pub secret_rotations: IntCounterVec,
    /// Signing secrets by their stage.
    pub secrets: GaugeVec,
    /// How long the youngest secret of each stage has been at it.
    pub secret_stage_seconds: GaugeVec,
    /// The age of the secret that signs.
    pub secret_active_age: Gauge,
    /// Until the next scheduled rotation.
    pub secret_next_rotation: Gauge,
    /// Whether proxies are named to be tested.
    pub canary_configured: Gauge,
    /// Canary tests that were run.
    pub canary_runs: IntCounterVec,
    /// How long they took.
    pub canary_seconds: Histogram,
    /// From the revocation of the probe's key to its refusal at a proxy.
    pub canary_revocation_seconds: Histogram,
    /// Their health, by what it can be.
    pub canary_status: GaugeVec,
    /// The share of tests that passed lately.
    pub canary_pass_rate: Gauge,
    /// How often in a row the critical test failed that did so most often.
    pub canary_consecutive_failures: Gauge,
    /// Whether somebody was told that they fail.
    pub canary_alerting: Gauge,
    /// When they were run last.
    pub canary_last_run: Gauge,
    /// Whether a Redis is configured.
    pub redis_configured: Gauge,
    /// Notifications, and what became of them.
    pub notifications: IntCounterVec,
    /// Cut-offs that did without the second approval that they needed.
    pub break_glass: IntCounter,
    /// Whether Redis answers.
    pub redis_connection: Gauge,
    /// Time that Redis takes.
    pub redis_seconds: HistogramVec,
    /// What went wrong with Redis.
    pub redis_errors: IntCounterVec,
    /// Edits by hand.
    pub redis_edits: IntCounterVec,
    /// How Redis is not set up as it should be.
    pub redis_problems: GaugeVec,
    /// Changes of other control planes that were taken in.
    pub merged: IntCounter,
    /// Live keys.
    pub active_keys: GaugeVec,
    /// Time to write and sync a batch of changes.
    pub journal_append_seconds: Histogram,
    /// Batches of changes that could not be written.
    pub journal_failures: IntCounter,
    /// Time for the store to take a batch of changes.
    pub store_apply_seconds: Histogram,
    /// Whether the journal's reserve is there: 0 when the disk is full and only changes that end keys are taken.
    pub journal_reserve: Gauge,
    /// Batches of changes that the store could not take.
    pub store_failures: IntCounter,
    /// Changes that the store has not taken yet.
    pub store_waiting: Gauge,
    /// From a change to its enforcement by the slowest proxy that was waited for.
    pub propagation_seconds: Histogram,
    /// Changes whose caller waited for the proxies in vain.
    pub propagation_timeouts: IntCounter,
    /// Proxies that were heard of within the hard age.
    pub fleet_proxies: Gauge,
    /// Proxies among them that do not enforce the newest version yet.
    pub fleet_behind: Gauge,
    /// For how long the one has been behind that has been so for longest.
    pub fleet_lag: Gauge,
    /// Proxies that were silent for longer than the hard age.
    pub fleet_stale: Gauge,
    /// What a proxy loads that has nothing yet.
    pub snapshot_bytes: Gauge,
    /// The time since the newest version was published.
    pub snapshot_age: Gauge,
    /// Answers to proxies, by kind.
    pub sync_answers: IntCounterVec,
    /// Bytes of those.
    pub sync_bytes: IntCounterVec,
    /// Polls refused for lack of the fleet token.
    pub sync_unauthorized: IntCounter,
    /// Polls of proxies that enforce a newer version than there is here.
    pub sync_ahead: IntCounter,
    /// Revoked and suspended keys that proxies know.
    pub revocations: Gauge,
    /// The version's sequence number.
    pub state_seq: Gauge,
}

impl Metrics {
    /// Makes and registers all of them.
    pub fn new(roles: &Roles) -> Arc<Self> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric");
            registry.register(Box::new(counters.clone())).expect("a name of its own");
            counters
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help).expect("a valid metric");
            registry.register(Box::new(counter.clone())).expect("a name of its own");
            counter
        };
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help).expect("a valid metric");
            registry.register(Box::new(gauge.clone())).expect("a name of its own");
            gauge
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = Histogram::with_opts(opts).expect("a valid metric");
            registry.register(Box::new(histogram.clone())).expect("a name of its own");
            histogram
        };
        // These outlive the process: what is shown of them is on disk.
        let kept = |name: &str, help: &str, labels: &[&str]| {
            IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric")
        };
        let times = |name, help, label| Times::new(name, help, label).expect("a valid metric");
        let validated = kept(
            "api_key_validated_total",
            "Keys looked at by proxies and by /api/auth/validate; role is 'unknown' when the signature did not verify.",
            &["role", "version", "result"],
        );
        let requests = kept(
            "keygate_requests_total",
            "Requests to proxies and what was decided; endpoint is the route's name in the policy, 'none' when none matched.",
            &["version", "endpoint", "outcome"],
        );
        let refusals = kept(
            "keygate_refusals_total",
            "Requests refused by proxies, by precise reason.",
            &["error_type"],
        );
        let upstream_answers = kept(
            "keygate_upstream_answers_total",
            "Answers of an upstream that tell of trouble, while a rollout is under way: error (500 and more), denied (401, 403, 429).",
            &["version", "endpoint", "kind"],
        );
        let auth_errors = kept(
            "auth_errors_total",
            "Requests refused by proxies and by the control plane's own API, by precise reason.",
            &["error_type", "version"],
        );
        let rate_limit_exceeded = kept(
            "rate_limit_exceeded_total",
            "Requests beyond a key's limit; endpoint is the route's name in the policy.",
            &["role", "endpoint"],
        );
        let validation_seconds = times(
            "key_validation_duration_seconds",
            "Time to decide on a key: of every call of the API, and of one in sixteen requests to proxies.",
            Some(("version", V2)),
        );
        let decode_seconds = times(
            "jwt_decode_duration_seconds",
            "Time to read and verify a token, or to find it remembered; of the same calls and requests.",
            None,
        );
        let kept = Shown::new(vec![
            Box::new(validated.clone()),
            Box::new(requests.clone()),
            Box::new(refusals.clone()),
            Box::new(upstream_answers.clone()),
            Box::new(auth_errors.clone()),
            Box::new(rate_limit_exceeded.clone()),
            Box::new(validation_seconds.clone()),
            Box::new(decode_seconds.clone()),
        ]);
        registry.register(Box::new(kept.clone())).expect("names of their own");
        let redis_seconds = HistogramVec::new(
            HistogramOpts::new(
                "redis_operation_duration_seconds",
                "Time that Redis takes, with what is done about it.",
            )
            .buckets(MILLISECONDS.to_vec()),
            &["operation"],
        )
        .expect("a valid metric");
        registry.register(Box::new(redis_seconds.clone())).expect("a name of its own");
        let redis_problems = GaugeVec::new(
            Opts::new("keygate_redis_setting_problem", "1 for what an operator should change in Redis."),
            &["setting"],
        )
        .expect("a valid metric");
        registry.register(Box::new(redis_problems.clone())).expect("a name of its own");
        let active_keys = GaugeVec::new(
            Opts::new("active_api_keys", "Keys neither revoked nor expired, to the minute."),
            &["role"],
        )
        .expect("a valid metric");
        registry.register(Box::new(active_keys.clone())).expect("a name of its own");

        let gauges = |name: &str, help: &str, label: &str| {
            let gauges = GaugeVec::new(Opts::new(name, help), &[label]).expect("a valid metric");
            registry.register(Box::new(gauges.clone())).expect("a name of its own");
            gauges
        };
        let canary_status =
            gauges("keygate_canary_status", "1 for what the health of canaries is at the moment.", "status");
        let secrets = gauges("keygate_secrets", "Signing secrets, by their stage.", "state");
        let secret_stage_seconds = gauges(
            "keygate_secret_stage_seconds",
            "Time that the secret which came to a stage last has been at it; 0 when none is.",
            "state",
        );

        let metrics = Self {
            created: counters("api_key_created_total", "Keys issued.", &["role", "version"]),
            validated,
            requests,
            refusals,
            upstream_answers,
            rollout_share: gauge(
                "keygate_rollout_share",
                "The share of subjects that goes to V2 at the moment, from 0 to 1, canary users and overrides apart.",
            ),
            rollout_strategy: gauges(
                "keygate_rollout_strategy",
                "1 for the strategy of the rollout.",
                "strategy",
            ),
            quota_questions: counter(
                "keygate_quota_questions_total",
                "Questions of proxies for units of limits that were answered.",
            ),
            quota_in_doubt: gauge(
                "keygate_quota_in_doubt",
                "1: caps of limits do not grow for 15 s, until proxies have told what another ledger granted them.",
            ),
            quota_suspended: gauge(
                "keygate_quota_suspended",
                "1: nothing is granted of limits, since another control plane may keep the ledger; proxies go by their shares.",
            ),
            quota_silent: gauge(
                "keygate_quota_silent_proxies",
                "Proxies that the ledger of limits has not heard of for 3 s, and not released yet.",
            ),
            quota_released_proxies: counter(
                "keygate_quota_released_proxies_total",
                "Proxies that ended or were lost without reporting what they spent of limits.",
            ),
            quota_released_units: counter(
                "keygate_quota_released_units_total",
                "Units of limits granted to those proxies and not reported as spent: as many may have been admitted once more.",
            ),
            quota_keeper: gauge(
                "keygate_quota_keeper",
                "1: this control plane divides the limits of the fleet among its proxies.",
            ),
            quota_pass_on_failures: counter(
                "keygate_quota_pass_on_failures_total",
                "Questions about limits that did not get to the control plane that divides them.",
            ),
            rollbacks: counter(
                "keygate_rollout_rollbacks_total",
                "Times that the guard rolled the rollout back.",
            ),
            refreshed: counters("api_key_refreshed_total", "Renewals asked for.", &["role", "success"]),
            revoked: counters("api_key_revoked_total", "Keys revoked.", &["role", "reason"]),
            auth_errors,
            validation_seconds,
            decode_seconds,
            kept,
            telemetry_failures: counter(
                "keygate_telemetry_failures_total",
                "Times that the reports of proxies could not be kept; they report again.",
            ),
            rate_limit_exceeded,
            secret_rotation_failures: counter(
                "secret_rotation_failures",
                "Rotations of signing secrets that failed.",
            ),
            secret_rotations: counters(
                "keygate_secret_rotations_total",
                "Rotations of signing secrets: begun by hand, completed, cancelled, forced before every proxy knew the secret.",
                &["outcome"],
            ),
            secrets,
            secret_stage_seconds,
            secret_active_age: gauge(
                "keygate_secret_active_age_seconds",
                "Time since the secret that signs was made.",
            ),
            secret_next_rotation: gauge(
                "keygate_secret_next_rotation_seconds",
                "Time until the next scheduled rotation, negative when it is late; NaN when none is scheduled.",
            ),
            canary_configured: gauge(
                "keygate_canary_configured",
                "1: proxies are named that canaries test; 0: none are, and nothing is run.",
            ),
            canary_runs: counters("keygate_canary_runs_total", "Canary tests that were run.", &["result"]),
            canary_seconds: histogram(
                "keygate_canary_duration_seconds",
                "Time that a canary test took.",
                &MILLISECONDS,
            ),
            canary_revocation_seconds: histogram(
                "keygate_canary_revocation_seconds",
                "From the revocation of the probe's key to its first refusal at a proxy.",
                &MILLISECONDS,
            ),
            canary_status,
            canary_pass_rate: gauge(
                "keygate_canary_pass_rate",
                "Canary tests of the last five minutes that passed, in percent; NaN without any.",
            ),
            canary_consecutive_failures: gauge(
                "keygate_canary_consecutive_failures",
                "How often in a row the critical canary test failed, at one proxy, that did so most often; as in canary/health.",
            ),
            canary_alerting: gauge(
                "keygate_canary_alerting",
                "1: critical canary tests failed as often as canary.alert says, and it is not over yet.",
            ),
            canary_last_run: gauge(
                "keygate_canary_last_run_timestamp_seconds",
                "When canary tests were run last, Unix seconds; 0: never.",
            ),
            redis_configured: gauge("keygate_redis_configured", "1: a Redis is configured."),
            notifications: counters(
                "keygate_notifications_total",
                "Notifications by destination: sent, failed after every try, or dropped since too many waited.",
                &["destination", "outcome"],
            ),
            break_glass: counter(
                "keygate_break_glass_total",
                "Cut-offs that did without the second approval that they needed.",
            ),
            redis_connection: gauge(
                "redis_connection_status",
                "1: Redis answers; 0: it does not, or none is configured. The journal keeps every change.",
            ),
            redis_seconds,
            redis_errors: counters("keygate_redis_errors_total", "What went wrong with Redis.", &["kind"]),
            redis_edits: counters(
                "keygate_redis_edits_total",
                "Edits of Redis keys by hand, put in force (taken) or refused.",
                &["key", "outcome"],
            ),
            redis_problems,
            merged: counter(
                "keygate_merged_changes_total",
                "Changes of other control planes that were taken in.",
            ),
            active_keys,
            journal_append_seconds: histogram(
                "keygate_journal_append_seconds",
                "Time to write a batch of changes to the journal and sync it.",
                &MICROSECONDS,
            ),
            journal_failures: counter(
                "keygate_journal_failures_total",
                "Batches of changes that could not be written.",
            ),
            store_apply_seconds: histogram(
                "keygate_store_apply_seconds",
                "Time for the store to take a batch of changes, after they were published.",
                &MICROSECONDS,
            ),
            journal_reserve: gauge(
                "keygate_journal_reserve",
                "Whether there is space in reserve; 0: the disk is full, only changes that end keys are taken.",
            ),
            store_failures: counter(
                "keygate_store_failures_total",
                "Batches of changes that the store could not take; they are in the journal and tried again.",
            ),
            store_waiting: gauge(
                "keygate_store_waiting",
                "Changes that are in the journal and the store has not taken: it failed, or the disk is full.",
            ),
            propagation_seconds: histogram(
                "keygate_propagation_seconds",
                "From a change to its acknowledgement by the slowest proxy, for calls with wait=applied.",
                &MILLISECONDS,
            ),
            fleet_proxies: gauge("keygate_fleet_proxies", "Proxies heard of within the hard age."),
            fleet_behind: gauge(
                "keygate_fleet_behind",
                "Proxies that do not enforce the newest version yet.",
            ),
            propagation_timeouts: counter(
                "keygate_propagation_timeouts_total",
                "Calls with wait=applied whose time was up before every proxy enforced the change.",
            ),
            fleet_lag: gauge(
                "keygate_fleet_lag_seconds",
                "For how long the proxy has been behind that has been so for longest; 0 when none is.",
            ),
            fleet_stale: gauge(
                "keygate_fleet_stale",
                "Proxies silent for longer than the hard age, which answer 503 unless they are gone; forgotten in time.",
            ),
            snapshot_bytes: gauge(
                "keygate_snapshot_bytes",
                "Bytes that a proxy loads which has nothing yet: rules and revocation set.",
            ),
            snapshot_age: gauge(
                "keygate_snapshot_age_seconds",
                "Time since the newest version was published, by this process.",
            ),
            sync_answers: counters("keygate_sync_answers_total", "Answers to proxies.", &["kind"]),
            sync_bytes: counters("keygate_sync_bytes_total", "Bytes of answers to proxies.", &["kind"]),
            sync_unauthorized: counter(
                "keygate_sync_unauthorized_total",
                "Polls without the right fleet token.",
            ),
            sync_ahead: counter(
                "keygate_sync_ahead_total",
                "Polls of proxies that enforce a newer version than this control plane has.",
            ),
            revocations: gauge("keygate_revocations", "Revoked and suspended keys that proxies know."),
            state_seq: gauge("keygate_state_seq", "Sequence number of the newest version."),
            registry,
        };
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("a name of its own");
        metrics.begin(roles);
        metrics.kept.show(metrics.kept.live());
        Arc::new(metrics)
    }

    /// Makes every series, with 0.
    fn begin(&self, roles: &Roles) {
        for role in roles.keys() {
            self.created.with_label_values(&[role.as_str(), V2]);
            self.active_keys.with_label_values(&[role]);
            for success in ["true", "false"] {
                self.refreshed.with_label_values(&[role.as_str(), success]);
            }
            for result in ["success", "failure"] {
                self.validated.with_label_values(&[role.as_str(), V2, result]);
            }
            for reason in RevocationReason::ALL {
                self.revoked.with_label_values(&[role.as_str(), reason.label()]);
            }
        }
        for kind in ["current", "delta", "snapshot", "shards"] {
            self.sync_answers.with_label_values(&[kind]);
            self.sync_bytes.with_label_values(&[kind]);
        }
        self.validated.with_label_values(&[telemetry::UNKNOWN, V2, "failure"]);
        for outcome in telemetry::OUTCOMES {
            self.requests.with_label_values(&[V2, "none", outcome]);
        }
        for result in ["pass", "fail"] {
            self.canary_runs.with_label_values(&[result]);
        }
        self.show_canary(&History::default().health(0, 1), None);
        for destination in Destination::LABELS {
            for outcome in notify::OUTCOMES {
                self.notifications.with_label_values(&[destination, outcome]);
            }
        }
        for outcome in ["begun", "completed", "cancelled", "forced"] {
            self.secret_rotations.with_label_values(&[outcome]);
        }
        for state in SecretState::ALL {
            self.secrets.with_label_values(&[state.label()]);
            self.secret_stage_seconds.with_label_values(&[state.label()]);
        }
        self.show_rollout(&Flags::default(), false, 0);
        for reason in Reason::ALL.iter().filter(|reason| reason.refusal().is_some()) {
            self.refusals.with_label_values(&[reason.label()]);
            self.auth_errors.with_label_values(&[reason.label(), V2]);
        }
    }

    /// Shows how the proxies fare.
    #[allow(clippy::cast_precision_loss)] // There are some thousands.
    pub fn show_fleet(&self, fleet: Summary) {
        self.fleet_proxies.set(fleet.live as f64);
        self.fleet_behind.set(fleet.behind as f64);
        self.fleet_lag.set(fleet.lag.as_secs_f64());
        self.fleet_stale.set(fleet.stale as f64);
    }

    /// Shows what the ledger of limits does not know, if it is kept here.
    #[allow(clippy::cast_precision_loss)] // Far below 2^53.
    pub fn show_quotas(&self, doubts: Option<&Doubts>) {
        let flag = |set: bool| f64::from(u8::from(set));
        self.quota_keeper.set(flag(doubts.is_some_and(|doubts| !doubts.suspended)));
        self.quota_in_doubt.set(flag(doubts.is_some_and(|doubts| !doubts.recovers_in.is_zero())));
        self.quota_suspended.set(flag(doubts.is_some_and(|doubts| doubts.suspended)));
        self.quota_silent.set(doubts.map_or(0.0, |doubts| doubts.silent.len() as f64));
        let Some(doubts) = doubts else { return };
        // A ledger that is opened again counts from 0.
        for (counter, total) in [
            (&self.quota_released_proxies, doubts.released_proxies),
            (&self.quota_released_units, doubts.released_units),
        ] {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// Shows the health of canaries, and when they were run last, Unix milliseconds.
    #[allow(clippy::cast_precision_loss)] // Milliseconds are far below 2^53.
    pub fn show_canary(&self, health: &Health, last_run_ms: Option<u64>) {
        for status in Health::STATUSES {
            let is_it = f64::from(u8::from(status == health.status));
            self.canary_status.with_label_values(&[status]).set(is_it);
        }
        self.canary_pass_rate.set(health.pass_rate.unwrap_or(f64::NAN));
        self.canary_consecutive_failures.set(f64::from(health.consecutive_failures));
        self.canary_alerting.set(f64::from(u8::from(health.alerting)));
        self.canary_last_run.set(last_run_ms.map_or(0.0, |last| last as f64 / 1_000.0));
    }

    /// Shows how the rollout stands at `now`, Unix seconds. Where there is no V1 everything goes to V2, whatever is set.
    pub fn show_rollout(&self, flags: &Flags, has_v1: bool, now: u64) {
        use keygate_core::decide::rollout::{FULL_SHARE, Strategy};
        for strategy in
            [Strategy::Off, Strategy::Canary, Strategy::Percentage, Strategy::Gradual, Strategy::Full]
        {
            let in_force = if has_v1 { flags.rollout.strategy } else { Strategy::Full };
            let is_it = f64::from(u8::from(strategy == in_force));
            self.rollout_strategy.with_label_values(&[strategy.label()]).set(is_it);
        }
        let share = if has_v1 { flags.share_at(now) } else { FULL_SHARE };
        self.rollout_share.set(f64::from(share) / f64::from(FULL_SHARE));
    }

    /// Shows how the secrets stand at `now`, and when the next rotation is due; both in Unix seconds.
    #[allow(clippy::cast_precision_loss)] // Seconds are far below 2^53.
    pub fn show_secrets(&self, ring: &Ring, next: Option<u64>, now: u64) {
        let since = |at: u64| now.saturating_sub(at) as f64;
        let all = ring.all();
        for state in SecretState::ALL {
            let at = all.iter().filter(|held| ring.state_of(held) == state);
            self.secrets.with_label_values(&[state.label()]).set(at.clone().count() as f64);
            let youngest = at.map(|held| held.record.since.max(held.record.created_at)).max();
            self.secret_stage_seconds.with_label_values(&[state.label()]).set(youngest.map_or(0.0, since));
        }
        self.secret_active_age.set(ring.active().map_or(0.0, |held| since(held.record.created_at)));
        self.secret_next_rotation.set(next.map_or(f64::NAN, |next| next as f64 - now as f64));
    }

    /// Makes the series of a policy's routes, with 0.
    pub fn begin_routes(&self, roles: &Roles, policy: &Policy) {
        for route in &policy.routes {
            for version in [V1, V2] {
                for outcome in telemetry::OUTCOMES {
                    self.requests.with_label_values(&[version, &route.name, outcome]);
                }
                for kind in Trouble::ALL {
                    self.upstream_answers.with_label_values(&[version, &route.name, kind.label()]);
                }
            }
        }
        for role in roles.keys() {
            for route in &policy.routes {
                self.rate_limit_exceeded.with_label_values(&[role.as_str(), &route.name]);
            }
        }
    }

    /// Counts an answer to a proxy.
    pub fn answered_proxy(&self, kind: &'static str, bytes: usize) {
        self.sync_answers.with_label_values(&[kind]).inc();
        self.sync_bytes.with_label_values(&[kind]).inc_by(bytes as u64);
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        // Writing into memory fails only for metrics without names.
        let _never = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_rollout_without_a_v1_is_not_shown_as_in_force() {
        let metrics = Metrics::new(&crate::roles::expand(crate::roles::defaults()));
        let mut flags = Flags::default();
        flags.rollout.strategy = keygate_core::decide::rollout::Strategy::Off;
        metrics.show_rollout(&flags, true, 0);
        let off = "keygate_rollout_strategy{strategy=\"off\"} 1";
        assert!(metrics.text().contains(off) && metrics.text().contains("keygate_rollout_share 0\n"));
        metrics.show_rollout(&flags, false, 0);
        assert!(!metrics.text().contains(off) && metrics.text().contains("keygate_rollout_share 1\n"));
    }

    #[test]
    fn every_series_is_there_before_anything_happened() {
        let metrics = Metrics::new(&crate::roles::expand(crate::roles::defaults()));
        crate::redis_store::begin_metrics(&metrics);
        let text = metrics.text();
        for series in [
            "api_key_created_total{role=\"basic\",version=\"v2\"} 0",
            "api_key_validated_total{result=\"failure\",role=\"admin\",version=\"v2\"} 0",
            "api_key_refreshed_total{role=\"basic\",success=\"false\"} 0",
            "api_key_revoked_total{reason=\"compromised\",role=\"contributor\"} 0",
            "auth_errors_total{error_type=\"revoked\",version=\"v2\"} 0",
            "key_validation_duration_seconds_count{version=\"v2\"} 0",
            "active_api_keys{role=\"node_operator\"} 0",
            "keygate_journal_failures_total 0",
            "keygate_break_glass_total 0",
            "keygate_canary_configured 0",
            "keygate_canary_consecutive_failures 0",
            "keygate_canary_alerting 0",
            "keygate_store_waiting 0",
            "keygate_propagation_timeouts_total 0",
            "keygate_fleet_stale 0",
            "keygate_fleet_lag_seconds 0",
            "keygate_snapshot_bytes 0",
            "keygate_snapshot_age_seconds 0",
            "redis_connection_status 0",
            "redis_operation_duration_seconds_count{operation=\"append\"} 0",
            "keygate_redis_errors_total{kind=\"out_of_memory\"} 0",
            "keygate_redis_errors_total{kind=\"forked\"} 0",
            "keygate_redis_edits_total{key=\"emergency_revocation\",outcome=\"refused\"} 0",
        ] {
            assert!(text.contains(series), "{series}");
        }
    }
}

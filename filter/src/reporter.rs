//! Tells the control plane what the VMs of this process have counted. The leader's work; what was acknowledged is in
//! shared data, so the next leader goes on where this one was.

use keygate_core::sync::wire::FORMAT;
use keygate_core::telemetry::{Counts, Receipt, Report, grown, ledger};

use crate::host::{Answer, CallId, Shared};

/// Where reports go.
pub const REPORT_PATH: &str = "/sync/v1/report";
/// Between two reports, until the control plane says otherwise.
const EVERY_NS: u64 = 500_000_000;
/// The longest time that a control plane may ask for.
const LONGEST_NS: u64 = 60_000_000_000;
/// The pause after a report that was not taken: doubled each time, from [`EVERY_NS`] and up to this.
const LONGEST_PAUSE_NS: u64 = 16_000_000_000;
/// How often pages of VMs that are gone are looked for.
const TIDY_EVERY_NS: u64 = 10_000_000_000;

/// Reports for one process.
#[derive(Default)]
pub struct Reporter {
    call: Option<CallId>,
    /// What is acknowledged when the report under way is.
    under_way: Vec<(String, u64)>,
    acknowledged: Option<Counts>,
    report_at_ns: u64,
    tidy_at_ns: u64,
    failures: u32,
}

impl Reporter {
    /// The report that is due, if there is anything new. `send` sends it, and gives the number of the call.
    pub fn report_if_due(
        &mut self,
        now_ns: u64,
        (proxy, incarnation): (&str, u64),
        send: impl FnOnce(&[u8]) -> Option<CallId>,
    ) {
        if now_ns >= self.tidy_at_ns {
            self.tidy_at_ns = now_ns.saturating_add(TIDY_EVERY_NS);
            ledger::tidy(&mut Shared, now_ns);
        }
        if self.call.is_some() || now_ns < self.report_at_ns {
            return;
        }
        self.report_at_ns = now_ns.saturating_add(EVERY_NS);
        let acknowledged = self.acknowledged.get_or_insert_with(|| ledger::acknowledged(&mut Shared));
        let counts = grown(&ledger::collect(&mut Shared), acknowledged);
        if counts.is_empty() {
            return;
        }
        self.under_way = counts.iter().map(|(name, (_, now))| (name.clone(), *now)).collect();
        let report = Report {
            format: FORMAT,
            proxy: proxy.to_owned(),
            incarnation: format!("{incarnation:016x}"),
            counts,
        };
        self.call = send(&serde_json::to_vec(&report).unwrap_or_default());
        if self.call.is_none() {
            self.hold_back(now_ns);
        }
    }

    /// Takes the answer to a report; whether it is one.
    pub fn on_answer(&mut self, token: CallId, answer: Option<&Answer>, now_ns: u64) -> bool {
        if self.call != Some(token) {
            return false;
        }
        self.call = None;
        let receipt = answer
            .filter(|answer| answer.status == 200)
            .and_then(|answer| serde_json::from_slice::<Receipt>(&answer.body).ok());
        let Some(receipt) = receipt else {
            self.hold_back(now_ns); // Nothing is lost: the next report has it again.
            return true;
        };
        self.failures = 0;
        let pause_ns = receipt.again_ms.saturating_mul(1_000_000).clamp(EVERY_NS, LONGEST_NS);
        self.report_at_ns = now_ns.saturating_add(pause_ns);
        let acknowledged = self.acknowledged.get_or_insert_with(Counts::default);
        for (name, number) in self.under_way.drain(..) {
            acknowledged.raise(&name, number);
        }
        ledger::acknowledge(&mut Shared, acknowledged);
        true
    }

    fn hold_back(&mut self, now_ns: u64) {
        let pause_ns =
            EVERY_NS.checked_shl(self.failures.min(5)).unwrap_or(LONGEST_PAUSE_NS).min(LONGEST_PAUSE_NS);
        self.failures = self.failures.saturating_add(1);
        self.report_at_ns = now_ns.saturating_add(pause_ns);
    }
}

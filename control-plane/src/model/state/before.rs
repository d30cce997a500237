//! The value that a change takes the place of, as the change that would put it back: for readers of the journal.

use super::Model;
use crate::model::approval::Warrant;
use crate::model::change::Change;

impl Model {
    /// The change that would undo `change`; `None` where it takes the place of nothing.
    pub fn before(&self, change: &Change) -> Option<Change> {
        match change {
            Change::SettingsChanged { .. } => {
                let settings = (*self.settings).clone();
                (!self.is_empty()).then_some(Change::SettingsChanged { settings })
            }
            Change::CanaryTestPut { test } => self.canary_test(&test.id),
            Change::CanaryTestDeleted { id } => self.canary_test(id),
            Change::CutoffLifted { id } => self.cutoff(id),
            Change::CutoffWithdrawn { id } => {
                let mut proposals = self.proposals.iter();
                let proposal = proposals.find(|proposal| proposal.cutoff.id == *id)?.clone();
                Some(Change::CutoffProposed { proposal })
            }
            Change::LockdownChanged { .. } => {
                Some(Change::LockdownChanged { lockdown: self.lockdown.clone() })
            }
            Change::PolicyReplaced { .. } => Some(Change::PolicyReplaced { policy: (*self.policy).clone() }),
            Change::LimitsChanged { .. } => {
                Some(Change::LimitsChanged { limits: Box::new((*self.limits).clone()) })
            }
            Change::LimitsOverridden { .. } => {
                Some(Change::LimitsOverridden { emergency: self.limits_override.clone() })
            }
            Change::QuotaOwnerChanged { .. } => {
                let (keeper, _) = self.limits_keeper?;
                Some(Change::QuotaOwnerChanged { keeper: keeper.source })
            }
            Change::RolloutChanged { .. } => {
                Some(Change::RolloutChanged { flags: Box::new((*self.flags).clone()) })
            }
            Change::Genesis { .. }
            | Change::HistoryForked { .. }
            | Change::StateReturned { .. }
            | Change::FingerprintsEnded { .. }
            | Change::SecretCreated { .. }
            | Change::SecretMoved { .. }
            | Change::SecretAnnounced { .. }
            | Change::SecretsOpened {}
            | Change::KeyIssued { .. }
            | Change::KeyRevoked { .. }
            | Change::JtiRevoked { .. }
            | Change::KeySuspended { .. }
            | Change::KeyResumed { .. }
            | Change::ExpiredForgotten { .. }
            | Change::RevocationsRebuilt {}
            | Change::PeerChanged { .. }
            | Change::EditRefused { .. }
            | Change::CutoffAdded { .. }
            | Change::CutoffProposed { .. } => None,
        }
    }

    /// A canary test that was defined; those that are there from the start are no changes.
    fn canary_test(&self, id: &str) -> Option<Change> {
        let test = self.canary_tests.get(id)?.clone()?;
        Some(Change::CanaryTestPut { test: Box::new(test) })
    }

    fn cutoff(&self, id: &str) -> Option<Change> {
        let cutoff = self.cutoffs.iter().find(|cutoff| cutoff.id == id)?.clone();
        let order = self.cutoff_orders.get(id)?;
        let (mut approved_by, mut break_glass) = (None, None);
        match &order.warrant {
            None => {}
            Some(Warrant::ApprovedBy(key_id)) => approved_by = Some(key_id.clone()),
            Some(Warrant::BreakGlass(justification)) => break_glass = Some(justification.clone()),
        }
        Some(Change::CutoffAdded { cutoff, reason: order.reason, approved_by, break_glass })
    }
}

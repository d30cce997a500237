//! Limits of keys, their override in an emergency, and the owner of the ledger.

use std::convert::Infallible;

use keygate_core::decide::limits::{Limits, Override};
use serde_json::Value;

use super::Plan;
use crate::model::View;
use crate::model::change::Change;
use crate::model::roles::Roles;
use crate::model::route_cost::{self, CostAboveLimit};
use crate::model::state::Keeper;

/// Limits are not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// The document has errors.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// Limits would be below the cost of a route that they apply to, and were not so before.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    CostAboveLimit(Vec<CostAboveLimit>),
}

/// Replaces the members of the limits that a document has.
///
/// # Errors
/// See [`LimitsError`].
pub fn edit(view: &View<'_>, document: &Value, roles: &Roles) -> Plan<(), LimitsError> {
    let current = view.model.limits();
    let edited = current.edited(document, |role| roles.contains_key(role)).map_err(LimitsError::Invalid)?;
    check_costs(view, &view.model.limits_with(&edited, view.model.limits_override()), roles)?;
    let is_same = edited == *current;
    Ok((if is_same { Vec::new() } else { vec![Change::LimitsChanged { limits: Box::new(edited) }] }, ()))
}

/// Overrides the limits of roles until a time, or lifts the override.
///
/// # Errors
/// See [`LimitsError`].
pub fn override_roles(view: &View<'_>, emergency: Option<Override>, roles: &Roles) -> Plan<(), LimitsError> {
    check_costs(view, &view.model.limits_with(view.model.limits(), emergency.as_ref()), roles)?;
    let is_same = emergency.is_none() && view.model.limits_override().is_none();
    Ok((if is_same { Vec::new() } else { vec![Change::LimitsOverridden { emergency }] }, ()))
}

fn check_costs(view: &View<'_>, limits: &Limits, roles: &Roles) -> Result<(), LimitsError> {
    let (policy, before) = (view.model.policy().0, view.model.limits_in_force());
    route_cost::check((policy, &before), (policy, limits), roles, view.now)
        .map_err(LimitsError::CostAboveLimit)
}

/// Makes a control plane the owner of the ledger of limits. One that has the ledger open, `has_ledger`, stays it.
pub fn take_over_ledger(view: &View<'_>, own: u64, has_ledger: bool) -> Plan<(), Infallible> {
    let is_owner = has_ledger || view.model.limits_keeper().is_some_and(|keeper| keeper.source == own);
    Ok((if is_owner { Vec::new() } else { vec![Change::QuotaOwnerChanged { keeper: own }] }, ()))
}

/// Makes a control plane the owner of the ledger of limits, if its owner is still `before`.
pub fn claim_ledger(view: &View<'_>, own: u64, before: Option<Keeper>) -> Plan<(), Infallible> {
    let is_same = view.model.limits_keeper() == before;
    Ok((if is_same { vec![Change::QuotaOwnerChanged { keeper: own }] } else { Vec::new() }, ()))
}

//! The route policy.

use keygate_core::decide::policy::{Mode, Policy, PolicyError as RouteError, Route};
use keygate_core::decide::rules::MAX_RULES_BYTES;

use serde::Serialize;

use super::{Expected, Plan, RevisionMismatch};
use crate::model::View;
use crate::model::change::Change;
use crate::model::roles::Roles;
use crate::model::route_cost::{self, CostAboveLimit};

/// The most bytes of a policy within the rules; the rest of them is small.
const MAX_BYTES: usize = MAX_RULES_BYTES - 64 * 1024;

/// A policy is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It was written for another revision.
    #[error(transparent)]
    Revision(#[from] RevisionMismatch),
    /// Routes have errors.
    #[error("The policy has {} error(s); nothing was changed.", .0.len())]
    Invalid(Vec<RouteError>),
    /// Routes would cost more than a limit that applies to them, and did not so before.
    #[error("routes cost more than a limit that applies to them")]
    CostAboveLimit(Vec<CostAboveLimit>),
    /// It has no route, so every request is refused.
    #[error(
        "The policy has no route, so every request would be refused, admins' too; nothing was changed. If that is meant: \
             ?allow_warnings=true"
    )]
    NoRoutes,
    /// It is too long.
    #[error("The policy has {0} bytes; at most {MAX_BYTES} reach a proxy at once.")]
    TooLong(usize),
}

/// What a replacement may do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The revision that it was written for.
    pub expected: Expected,
    /// Whether what is legal but hardly meant is taken.
    pub allow_warnings: bool,
    /// Whether nothing is changed.
    pub dry_run: bool,
}

/// A doubt about a policy that is legal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The route, if it is about one.
    pub route: Option<String>,
    /// The doubt, for machines.
    pub code: &'static str,
    /// The doubt, for people.
    pub detail: &'static str,
}

/// What is doubtful in a policy.
pub fn warnings(policy: &Policy) -> Vec<Warning> {
    let no_routes =
        Warning { route: None, code: "no_routes", detail: "No route matches, so every request is refused." };
    policy.routes.is_empty().then_some(no_routes).into_iter().collect()
}

/// A policy, and the one that it replaces.
#[derive(Debug)]
pub struct Replaced {
    /// The policy before.
    pub before: Policy,
    /// The policy now.
    pub policy: Policy,
}

/// Replaces the members of the policy that are given.
///
/// # Errors
/// See [`PolicyError`].
pub fn replace(
    view: &View<'_>,
    mode: Option<Mode>,
    routes: Option<Vec<Route>>,
    options: Options,
    roles: &Roles,
) -> Plan<Replaced, PolicyError> {
    let (current, revision) = view.model.policy();
    options.expected.check(revision)?;
    let policy = Policy {
        mode: mode.unwrap_or(current.mode),
        routes: routes.unwrap_or_else(|| current.routes.clone()),
    };
    policy.validate().map_err(PolicyError::Invalid)?;
    if policy.routes.is_empty() && !current.routes.is_empty() && !options.allow_warnings {
        return Err(PolicyError::NoRoutes);
    }
    let limits = view.model.limits_in_force();
    route_cost::check((current, &limits), (&policy, &limits), roles, view.now)
        .map_err(PolicyError::CostAboveLimit)?;
    let bytes = serde_json::to_vec(&policy).map_or(usize::MAX, |bytes| bytes.len());
    if bytes > MAX_BYTES {
        return Err(PolicyError::TooLong(bytes));
    }
    let changes = if options.dry_run || policy == *current {
        Vec::new()
    } else {
        vec![Change::PolicyReplaced { policy: policy.clone() }]
    };
    Ok((changes, Replaced { before: current.clone(), policy }))
}

//! `/api/admin/emergency/approvals`: cut-offs that end so many keys that two keys must want them.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json as value};

use super::emergency::{note_revoked, order_view};
use super::request::{self, Because, KeyId, Waits};
use super::{Caller, actor};
use crate::durability::writer::Committed;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::approval::Proposal;
use crate::model::commands::emergency as commands;
use crate::platform::clock;

/// The answer to an order that waits for its second approval. `answer` has the order.
pub async fn pending(
    app: &ApiState,
    committed: Committed,
    waits: Waits,
    proposal: &Proposal,
    mut answer: Value,
) -> Response {
    let (id, keys) = (&proposal.cutoff.id, proposal.count.keys());
    tracing::warn!(by = proposal.requested_by, id, keys, "a mass revocation waits for its second approval");
    answer["share"] = proposal.count.share().into();
    answer["approval"] = approval_view(proposal);
    request::finish(app, committed, waits.for_nothing(), StatusCode::ACCEPTED, answer).await
}

pub async fn approve(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let approver = Arc::clone(&caller.0);
    let command = move |view: &View<'_>| commands::approve(view, &id, &approver.claims);
    let (proposal, committed) = app.writer.submit(&caller.author_because(reason)?, command).await??;
    let Proposal { cutoff, reason, requested_by, count, .. } = proposal;
    note_revoked(&app, &caller, &cutoff.id, &count, reason);
    let mut answer = order_view(&cutoff, &count);
    answer["reason"] = value!(reason);
    answer["requested_by"] = requested_by.into();
    answer["approved_by"] = actor(&caller.0).into();
    answer["ends_approver"] = cutoff.hits(&caller.0.claims, &caller.0.kid).into();
    Ok(request::finish(&app, committed, waits, StatusCode::OK, answer).await)
}

pub async fn withdraw(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let command = move |view: &View<'_>| commands::withdraw(view, &id);
    let (proposal, committed) = app.writer.submit(&caller.author_because(reason)?, command).await??;
    tracing::warn!(by = actor(&caller.0), id = proposal.cutoff.id, "a mass revocation was withdrawn");
    let answer = value!({ "withdrawn": proposal_view(&proposal) });
    Ok(request::finish(&app, committed, waits.for_nothing(), StatusCode::OK, answer).await)
}

/// The cut-offs of `proposals` that wait at `now`.
pub fn pending_view(proposals: &[Proposal], now: u64) -> Value {
    proposals.iter().filter(|proposal| proposal.is_pending(now)).map(proposal_view).collect()
}

fn approval_view(proposal: &Proposal) -> Value {
    value!({
        "id": proposal.cutoff.id,
        "requested_by": proposal.requested_by,
        "requested_at": clock::rfc3339(proposal.requested_at),
        "expires_at": clock::rfc3339(proposal.expires_at()),
        "approve": format!("POST /api/admin/emergency/approvals/{}", proposal.cutoff.id),
    })
}

fn proposal_view(proposal: &Proposal) -> Value {
    let mut view = order_view(&proposal.cutoff, &proposal.count);
    view["share"] = proposal.count.share().into();
    view["reason"] = value!(proposal.reason);
    view["approval"] = approval_view(proposal);
    view
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::api::world::World;
    use crate::model::approval::LIFE_S;
    use crate::model::commands::emergency::MAX_PENDING;

    const REVOKE: &str = "/api/admin/emergency/revoke";
    const SETTINGS: &str = "emergency.second_approval_threshold = 0.25";

    impl World {
        /// Asks to end every key; the path of its approval.
        async fn ask(&self) -> String {
            self.ask_as(&self.admin).await
        }

        async fn ask_as(&self, key: &str) -> String {
            let (status, answer) = self.call("POST", REVOKE, key, value!({})).await;
            assert_eq!(status, 202, "{answer}");
            format!("/api/admin/emergency/approvals/{}", answer["approval"]["id"].as_str().unwrap())
        }

        async fn emergency(&self) -> Value {
            self.call("GET", "/api/admin/emergency", &self.admin, value!({})).await.1
        }
    }

    #[tokio::test]
    async fn a_request_waits_for_an_hour_and_is_forgotten_with_the_next_one() {
        let world = World::new(SETTINGS).await;
        let second = world.issue("admin").await;
        world.pass(1);
        let path = world.ask().await;
        world.pass(LIFE_S);
        for method in ["POST", "DELETE"] {
            let (status, answer) = world.call(method, &path, &second, value!({})).await;
            assert_eq!((status, &answer["code"]), (404, &value!("not_found")), "{answer}");
        }
        assert_eq!(world.emergency().await["approvals"], value!([]));
        assert_eq!(world.serving.app.state().proposals.len(), 1);

        let path = world.ask().await;
        assert_eq!(world.serving.app.state().proposals.len(), 1, "the expired one is gone");
        world.pass(LIFE_S - 1);
        let version = world.serving.app.state().version;
        let (status, answer) = world.call("POST", &path, &second, value!({})).await;
        assert_eq!(status, 200, "{answer}");
        assert!(world.serving.app.state().proposals.is_empty());
        assert!(world.serving.app.state().version > version, "now it is news for proxies");
        let (status, _) = world.call("POST", &path, &world.admin, value!({})).await;
        assert_eq!(status, 404, "what is approved waits no more");
    }

    #[tokio::test]
    async fn what_a_key_asked_for_that_has_ended_since_cannot_be_approved() {
        let world = World::new(SETTINGS).await;
        let (stolen, stolen_id) = world.issue_with_id("admin").await;
        let second = world.issue("admin").await;
        world.pass(1);
        let path = world.ask_as(&stolen).await;
        for action in ["suspend", "revoke"] {
            let end = format!("/api/admin/keys/{stolen_id}/{action}");
            assert_eq!(world.call("POST", &end, &world.admin, value!({})).await.0, 200);
            let (status, answer) = world.call("POST", &path, &second, value!({})).await;
            assert_eq!((status, &answer["code"]), (409, &value!("requester_ended")), "{action}: {answer}");
        }
        assert_eq!(world.emergency().await["cutoffs"], value!([]));
    }

    #[tokio::test]
    async fn only_so_many_wait_and_proxies_hear_of_none() {
        let world = World::new(SETTINGS).await;
        world.issue("basic").await;
        let version = world.serving.app.state().version;
        let first = world.ask().await;
        for _ in 1..MAX_PENDING {
            world.ask().await;
        }
        let (status, answer) = world.call("POST", REVOKE, &world.admin, value!({})).await;
        assert_eq!((status, &answer["code"]), (409, &value!("too_many_approvals")), "{answer}");
        let (status, answer) = world.call("DELETE", &first, &world.admin, value!({})).await;
        assert_eq!((status, &answer["withdrawn"]["keys"]), (200, &value!(1)), "{answer}");
        world.ask().await;
        assert_eq!(world.emergency().await["approvals"].as_array().unwrap().len(), MAX_PENDING);
        assert_eq!(world.emergency().await["cutoffs"], value!([]));
        assert_eq!(world.serving.app.state().version, version);
    }
}

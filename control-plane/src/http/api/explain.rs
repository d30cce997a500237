//! `/api/admin/explain`: how a request would be decided, by the code that decides it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::decide::cache::TokenCache;
use keygate_core::decide::client::ClientAddress;
use keygate_core::decide::forward::Forwarded;
use keygate_core::decide::{self, Judge, Request, Trace, Verdict, decide};
use keygate_core::token::credential::Credential;
use serde::Deserialize;

use super::json;
use super::request::{self, Body};
use crate::http::api::ApiState;
use crate::http::problem::Problem;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    token: Option<String>,
    method: String,
    path: String,
    /// The client's address: of who shows no key, a rollout goes by it.
    client: Option<String>,
}

/// Collects the steps.
#[derive(Default)]
struct Steps(Vec<serde_json::Value>);

impl Trace for Steps {
    fn step(&mut self, step: &'static str, detail: impl FnOnce() -> String) {
        self.0.push(serde_json::json!({ "step": step, "detail": detail() }));
    }
}

pub async fn explain(State(app): State<Arc<ApiState>>, Body(bytes): Body) -> Result<Response, Problem> {
    // An error about this body must not repeat any of it: there is a key in it.
    let question: Question = request::body_with_key(&bytes).map_err(|_| {
        Problem::bad_request(
            "The body must be {\"method\", \"path\", \"token\"?, \"client\"?}, all of them texts.",
        )
    })?;
    let state = app.state();
    let mut steps = Steps::default();
    let mut cache = TokenCache::new(0);
    let judge = Judge {
        cache: &mut cache,
        meter: (),
        revocations: &state.revocations,
        now: app.clock.now_s(),
        trace: &mut steps,
    };
    let credential =
        question.token.as_ref().map_or(Credential::None, |token| Credential::One(token.as_bytes()));
    let client = question.client.as_deref().and_then(|client| ClientAddress::new(client.as_bytes()));
    let request =
        Request { method: question.method.as_bytes(), path: question.path.as_bytes(), credential, client };
    let decision = decide(decide::State::Fresh(&state.rules), request, judge);
    let (verdict, status, code) = match decision.verdict {
        Verdict::Forward => ("forward", None, None),
        Verdict::Refuse(refusal) => ("refuse", Some(refusal.status()), Some(refusal.code())),
    };
    let headers: serde_json::Map<String, serde_json::Value> = match decision.verdict {
        Verdict::Forward => {
            let forwarded = Forwarded::of(&decision);
            forwarded.headers().map(|(name, value)| (name.to_owned(), value.into())).collect()
        }
        Verdict::Refuse(_) => serde_json::Map::new(),
    };
    Ok(json(
        StatusCode::OK,
        serde_json::json!({
            "decision": verdict,
            "status": status,
            "code": code,
            "reason": decision.reason.label(),
            "route": decision.route.map(|route| &route.name),
            "key_id": decision.key.as_ref().map(|key| &key.claims.sub),
            "shadowed": decision.shadowed,
            "upstream": decision.choice.version.label(),
            "rollout": decision.choice.why.label(),
            "forwarded_headers": headers,
            "version": state.version,
            "steps": steps.0,
        }),
    ))
}

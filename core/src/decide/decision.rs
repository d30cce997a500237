//! The decision on a request: one pure function, the same in Envoy, in the control plane's own API, in
//! `/api/auth/validate`, in a dry run and in a test.
//!
//! It answers in this order, the cheapest refusal first: route, rollout, credential, age of the state, the token
//! (remembered, or read strictly, checked and verified), lockdown and revocation, scopes and roles, limits.
//! Removing the client's own `x-keygate-*` headers and adding ours is [`crate::decide::forward`].

use std::sync::Arc;

use crate::decide::cache::{Place, TokenCache, Verified};
use crate::decide::client::ClientAddress;
use crate::decide::ended::ended;
use crate::decide::limits::{Left, Limit, Meter, Metered};
use crate::decide::policy::{Access, Mode, Route, Stale};
use crate::decide::reason::Reason;
use crate::decide::refusal::Refusal;
use crate::decide::rollout::{ApiVersion, Choice, Subject};
use crate::decide::rules::Ruleset;
use crate::revocation::Revocations;
use crate::token::credential::Credential;
use crate::token::crypto;
use crate::token::{self, Malformed, Token};

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    /// The method, as sent.
    pub method: &'r [u8],
    /// The path as it is forwarded, with or without query.
    pub path: &'r [u8],
    /// The credential, from [`crate::token::credential::find`].
    pub credential: Credential<'r>,
    /// The client's address; `None` when it is not known. To be given if [`Ruleset::reads_client`].
    pub client: Option<ClientAddress<'r>>,
}

/// The state that a decision is made with.
#[derive(Debug, Clone, Copy)]
pub enum State<'s> {
    /// None yet.
    Missing,
    /// The control plane has not been heard of for longer than the hard age.
    Stale(&'s Ruleset),
    /// In touch.
    Fresh(&'s Ruleset),
}

impl<'s> State<'s> {
    /// The state of `rules` that were last known to be the newest `age_ns` nanoseconds ago. At the hard age
    /// it is stale, not after it: the control plane counts on that.
    pub fn aged(rules: &'s Ruleset, age_ns: u64) -> Self {
        let hard_age_ns = rules.hard_age_s.saturating_mul(1_000_000_000);
        if age_ns >= hard_age_ns { Self::Stale(rules) } else { Self::Fresh(rules) }
    }

    /// Whether any route is served with it: what a load balancer wants to know.
    pub fn serves(self) -> bool {
        match self {
            Self::Missing => false,
            Self::Stale(rules) => rules.policy.allows_stale(),
            Self::Fresh(_) => true,
        }
    }
}

/// The decision.
#[derive(Debug)]
pub struct Decision<'s> {
    /// What to do.
    pub verdict: Verdict,
    /// Precisely why; for metrics, logs and telemetry, never for the client.
    pub reason: Reason,
    /// The route that matched.
    pub route: Option<&'s Route>,
    /// Which version of the upstream it is for, and why; V2, which is what Keygate enforces for, decides all the rest.
    pub choice: Choice,
    /// Whose key it is, once its signature is verified, also when it is refused.
    pub key: Option<Arc<Verified>>,
    /// What is left of the limit that it was counted for, if there is one.
    pub left: Option<Left>,
    /// Whether it would have been refused, were the mode not `shadow`.
    pub shadowed: bool,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Forward,
    /// Answer it with a refusal.
    Refuse(Refusal),
}

/// Follows a decision step by step. `()` follows nothing and costs nothing.
pub trait Trace {
    /// A step was taken; `detail` says what was found, without any part of a token.
    fn step(&mut self, step: &'static str, detail: impl FnOnce() -> String);
}

impl Trace for () {
    fn step(&mut self, _: &'static str, _: impl FnOnce() -> String) {}
}

/// Who decides: what is remembered, who is revoked, and at what time.
pub struct Judge<'a, R, T, M = ()> {
    /// Tokens verified before.
    pub cache: &'a mut TokenCache,
    /// Counts what is done.
    pub meter: M,
    /// Who is revoked.
    pub revocations: R,
    /// Now, Unix seconds.
    pub now: u64,
    /// Follows the decision.
    pub trace: &'a mut T,
}

/// What is known of the token of a request: looked for, read and hashed at most once.
#[derive(Default)]
struct Reading<'r> {
    /// Where it is in the cache, once it was looked for.
    place: Option<Option<Place>>,
    read: Option<Result<Token<'r>, Malformed>>,
    /// The hash of its subject.
    subject: Option<u64>,
}

impl<'r> Reading<'r> {
    fn place(&mut self, cache: &TokenCache, token: &[u8]) -> Option<Place> {
        *self.place.get_or_insert_with(|| cache.find(token))
    }

    fn read(&mut self, token: &'r [u8]) -> &Result<Token<'r>, Malformed> {
        self.read.get_or_insert_with(|| token::read(token))
    }

    fn take(self, token: &'r [u8]) -> Result<Token<'r>, Malformed> {
        self.read.unwrap_or_else(|| token::read(token))
    }
}

/// Decides on a request.
pub fn decide<'s, R: Revocations, T: Trace, M: Meter>(
    state: State<'s>,
    request: Request<'_>,
    mut judge: Judge<'_, R, T, M>,
) -> Decision<'s> {
    let (rules, stale) = match state {
        State::Missing => {
            judge.trace.step("state", || "none yet".into());
            return Decision::new(Reason::NoState, None, None);
        }
        State::Stale(rules) => (rules, true),
        State::Fresh(rules) => (rules, false),
    };
    let path = request.path.split(|byte| *byte == b'?').next().unwrap_or_default();
    let route = rules.policy.route(request.method, path);
    judge.trace.step("route", || match route {
        Some(route) => format!("{} ({:?})", route.name, route.access).to_lowercase(),
        None => "none matches".into(),
    });
    let mut decision = match route {
        None => Decision::new(Reason::NoRoute, None, None),
        Some(route) => {
            let mut reading = Reading::default();
            let choice = judge.choose(rules, route, path, &request, &mut reading);
            let decision = match choice.version {
                ApiVersion::V1 => Decision::new(Reason::V1, Some(route), None),
                ApiVersion::V2 => judge.on_route(rules, stale, route, &request, reading),
            };
            Decision { choice, ..decision }
        }
    };
    if rules.policy.mode == Mode::Shadow && decision.verdict != Verdict::Forward {
        judge.trace.step("mode", || "shadow: not carried out".into());
        decision.verdict = Verdict::Forward;
        decision.shadowed = true;
    }
    decision
}

/// Decides on a credential for one route, whatever the policy says of others. Shadow mode does not apply.
pub fn decide_on_route<'s, R: Revocations, T: Trace, M: Meter>(
    rules: &Ruleset,
    route: &'s Route,
    credential: Credential<'_>,
    mut judge: Judge<'_, R, T, M>,
) -> Decision<'s> {
    let request = Request { method: b"", path: b"", credential, client: None };
    judge.on_route(rules, false, route, &request, Reading::default())
}

impl<'s> Decision<'s> {
    fn new(reason: Reason, route: Option<&'s Route>, key: Option<Arc<Verified>>) -> Self {
        let verdict = reason.refusal().map_or(Verdict::Forward, Verdict::Refuse);
        Self { verdict, reason, route, choice: Choice::SETTLED, key, left: None, shadowed: false }
    }
}

impl<R: Revocations, T: Trace, M: Meter> Judge<'_, R, T, M> {
    /// Which version of the upstream a request is for. Whose a key is need not be verified for that: V1 judges by
    /// itself, and V2 is decided here.
    fn choose<'r>(
        &mut self,
        rules: &Ruleset,
        route: &Route,
        path: &[u8],
        request: &Request<'r>,
        reading: &mut Reading<'r>,
    ) -> Choice {
        let plan = &rules.rollout;
        if plan.is_settled() {
            return Choice::SETTLED;
        }
        let name = Some(route.name.as_str());
        let of = |subject: &Subject<'_>| plan.choose(subject, name, path, self.now);
        let choice = match request.credential {
            Credential::None => of(&Subject::of_address(ClientAddress::bytes_of(request.client))),
            Credential::Many => plan.for_legacy(name, path),
            Credential::One(token) => {
                let place = reading.place(self.cache, token);
                match place.and_then(|place| self.cache.at(place)) {
                    Some(known) => {
                        let claims = &known.claims;
                        of(&Subject::of_parts(claims.own.as_deref(), &claims.sub, known.subject))
                    }
                    None => {
                        match reading.read(token).as_ref().ok().filter(|read| read.claims.iss == rules.issuer)
                        {
                            Some(read) => {
                                let subject = Subject::of_key(read.claims.own.as_deref(), &read.claims.sub);
                                let choice = of(&subject);
                                reading.subject = Some(subject.hash);
                                choice
                            }
                            None => plan.for_legacy(name, path),
                        }
                    }
                }
            }
        };
        self.trace.step("rollout", || format!("{} ({})", choice.version.label(), choice.why.label()));
        choice
    }

    fn on_route<'s, 'r>(
        &mut self,
        rules: &Ruleset,
        stale: bool,
        route: &'s Route,
        request: &Request<'r>,
        reading: Reading<'r>,
    ) -> Decision<'s> {
        let refuse = |reason, key| Decision::new(reason, Some(route), key);
        let too_old = stale && route.stale == Stale::Deny;
        if route.access == Access::Public {
            if too_old {
                return refuse(Reason::StaleState, None);
            }
            let public = rules.limits.public.filter(|_| route.cost > 0);
            let account = public.map(|public| (public.account(request.client), public.limit()));
            return self.meter(account, refuse(Reason::Public, None));
        }
        let token = match request.credential {
            Credential::None => return refuse(Reason::MissingCredential, None),
            Credential::Many => return refuse(Reason::TooManyCredentials, None),
            Credential::One(token) => token,
        };
        self.trace.step("credential", || "exactly one".into());
        if too_old {
            self.trace.step("state", || "older than the hard age".into());
            return refuse(Reason::StaleState, None);
        }
        let key = match self.verify(rules, token, reading) {
            Ok(key) => key,
            // A secret may have been made since: that is not for the client to be told of as a bad key.
            Err(Reason::UnknownKid) if stale && !has_ended(rules, token) => {
                self.trace.step("token", || "of a secret that may be newer than the state".into());
                return refuse(Reason::StaleState, None);
            }
            Err(reason) => {
                self.trace.step("token", || reason.label().into());
                return refuse(reason, None);
            }
        };
        let reason = self.standing(rules, &key).and_then(|()| permits(route, &key));
        self.trace.step("permission", || reason.err().map_or("granted", Reason::label).into());
        if let Err(reason) = reason {
            return refuse(reason, Some(key));
        }
        let limit = rules.limits.of_key(key.claims.holder(), self.now);
        let account = limit.map(|(share, limit)| (key.accounts.of(share), limit));
        self.meter(account, refuse(Reason::Allowed, Some(key)))
    }

    /// Counts a request that may pass, if there is a limit; it may not if it is beyond that. A request that costs
    /// nothing is not counted.
    fn meter<'s>(&mut self, account: Option<(u64, Limit)>, decision: Decision<'s>) -> Decision<'s> {
        let Some((account, limit)) = account else { return decision };
        let cost = decision.route.map_or(1, |route| route.cost);
        if cost == 0 {
            self.trace.step("limit", || "costs nothing".into());
            return decision;
        }
        let metered = self.meter.spend(account, limit, cost);
        self.trace.step("limit", || match metered {
            Metered::Within(left) => format!("{} of {} left", left.remaining, limit.units),
            Metered::Beyond(_) => format!("{} in {} s are reached", limit.units, limit.window_s),
            Metered::Pending(left) => format!("{} of {} left, elsewhere", left.remaining, limit.units),
            Metered::Unknown => "not known".into(),
            Metered::Not => format!("{} in {} s, not counted here", limit.units, limit.window_s),
        });
        match metered {
            Metered::Not => decision,
            Metered::Unknown => Decision::new(Reason::LimitUnknown, decision.route, decision.key),
            Metered::Within(left) => Decision { left: Some(left), ..decision },
            Metered::Pending(left) => {
                let refused = Decision::new(Reason::LimitPending, decision.route, decision.key);
                Decision { left: Some(left), ..refused }
            }
            Metered::Beyond(left) => {
                let refused = Decision::new(Reason::RateLimited, decision.route, decision.key);
                Decision { left: Some(left), ..refused }
            }
        }
    }

    /// The token behind the bytes, if it is one of ours that counts now.
    fn verify<'r>(
        &mut self,
        rules: &Ruleset,
        token: &'r [u8],
        mut reading: Reading<'r>,
    ) -> Result<Arc<Verified>, Reason> {
        let place = reading.place(self.cache, token);
        if let Some(known) = self.cache.take(place) {
            let verifier = rules.verifier(&known.kid).filter(|verifier| verifier.tag == known.key_tag);
            if let Some(verifier) = verifier {
                let checked = check(rules, verifier.not_after, &known.claims, self.now);
                if checked == Err(Reason::Expired) {
                    self.cache.remove(token);
                }
                self.trace.step("token", || "verified before".into());
                return checked.map(|()| known);
            }
            // Verified by a secret that is gone, or that now means another key: from the beginning.
            self.cache.remove(token);
        }
        let subject = reading.subject;
        let read = reading.take(token).map_err(|malformed| {
            self.trace.step("token", || malformed.to_string());
            Reason::Malformed
        })?;
        let verifier = rules.verifier(&read.kid).ok_or(Reason::UnknownKid)?;
        if verifier.alg != read.alg {
            return Err(Reason::AlgorithmMismatch);
        }
        check(rules, verifier.not_after, &read.claims, self.now)?;
        if verifier.jti_key.as_ref().is_some_and(|key| !key.made(&read.claims.jti)) {
            self.trace.step("token", || "its id is none of ours; the signature was not looked at".into());
            return Err(Reason::ForgedId);
        }
        if !crypto::verify(verifier.alg, &verifier.key, read.signing_input, read.signature) {
            return Err(Reason::BadSignature);
        }
        self.trace.step("token", || format!("{} signature of {} verified", read.alg.name(), read.kid));
        let verified = Arc::new(Verified::new(read.kid, verifier.tag, read.claims, subject));
        self.cache.insert(token, Arc::clone(&verified));
        Ok(verified)
    }

    /// Whether a verified key is one that is still wanted.
    fn standing(&mut self, rules: &Ruleset, key: &Verified) -> Result<(), Reason> {
        let (revocations, trace) = (&mut self.revocations, &mut *self.trace);
        ended(rules.lockdown.as_ref(), &rules.cutoffs, key, self.now, |fingerprint| {
            let standing = revocations.standing(fingerprint);
            trace.step("revocation", || format!("{standing:?}").to_lowercase());
            standing
        })
    }
}

/// Whether a token names a secret that is known, and so has ended if it does not count.
fn has_ended(rules: &Ruleset, token: &[u8]) -> bool {
    token::read(token).is_ok_and(|read| rules.verifier(&read.kid).is_some())
}

/// What is asked of a token on every request, whether or not it was verified before.
fn check(rules: &Ruleset, not_after: Option<u64>, claims: &token::Claims, now: u64) -> Result<(), Reason> {
    let leeway = rules.leeway_s;
    if not_after.is_some_and(|end| now >= end) {
        return Err(Reason::UnknownKid);
    }
    if claims.iss != rules.issuer {
        return Err(Reason::WrongIssuer);
    }
    if rules.audience.is_some() && claims.aud != rules.audience {
        return Err(Reason::WrongAudience);
    }
    if now >= claims.exp.saturating_add(leeway) || claims.exp <= rules.expired_until {
        return Err(Reason::Expired);
    }
    if claims.iat.max(claims.nbf.unwrap_or(0)) > now.saturating_add(leeway) {
        return Err(Reason::NotYetValid);
    }
    if claims.exp.saturating_sub(claims.iat) > rules.max_life_s {
        return Err(Reason::LifeTooLong);
    }
    Ok(())
}

fn permits(route: &Route, key: &Verified) -> Result<(), Reason> {
    let has = |wanted: &String| key.claims.scope.split(' ').any(|scope| scope == wanted);
    if !route.scopes.iter().all(has) {
        return Err(Reason::MissingScope);
    }
    if !route.roles.is_empty() && !route.roles.contains(&key.claims.role) {
        return Err(Reason::WrongRole);
    }
    Ok(())
}

#[cfg(test)]
mod tests;

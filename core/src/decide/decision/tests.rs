use jsonwebtoken::EncodingKey;

use super::*;
use crate::decide::cutoff::{Cutoff, Lockdown, Scope};
use crate::decide::forward::Forwarded;
use crate::decide::policy::Policy;
use crate::decide::rollout::Rollout;
use crate::decide::rules::{Rules, VerificationKey};
use crate::revocation::Standing;
use crate::revocation::{ExactSet, Fingerprint, Op};
use crate::secret::Secret;
use crate::telemetry::Tally;
use crate::token::crypto::{Algorithm, native};
use crate::token::jti::JtiKey;
use crate::token::{Claims, TYPE};

const NOW: u64 = 10_000;

struct World {
    rules: Rules,
    revoked: ExactSet,
    cache: TokenCache,
    now: u64,
    stale: bool,
}

fn world() -> World {
    native::install();
    let policy: Policy = serde_json::from_str(
        r#"{"routes":[
            {"name":"home","path":"/","access":"public"},
            {"name":"read","path":"/chat","methods":["GET"],"access":"key","scopes":["chat:read"]},
            {"name":"both","path":"/both","access":"key","scopes":["chat:read","chat:write"]},
            {"name":"staff","path":"/staff","access":"key","roles":["admin","staff"]},
            {"name":"few","path":"/few","access":"key","forward":["owner","key_id"]},
            {"name":"none","path":"/none","access":"key","forward":[]},
            {"name":"lax","path":"/lax","access":"key","stale":"allow"}]}"#,
    )
    .unwrap();
    let key = |kid: &str, alg: Algorithm, material: Vec<u8>| VerificationKey {
        kid: kid.into(),
        alg,
        material: Secret::new(material),
        not_after: None,
        jti_key: None,
    };
    World {
        rules: Rules {
            policy,
            ..Rules::minimal(vec![
                key("es", Algorithm::ES256, native::p256_point(&[7; 32]).unwrap()),
                key("hs", Algorithm::HS256, vec![9; 32]),
            ])
        },
        revoked: ExactSet::default(),
        cache: TokenCache::new(100_000),
        now: NOW,
        stale: false,
    }
}

fn claims() -> Claims {
    Claims {
        iss: "keygate".into(),
        sub: "key_1".into(),
        jti: "jti-1".into(),
        iat: NOW - 100,
        exp: NOW + 100,
        nbf: None,
        aud: None,
        role: "basic".into(),
        scope: "chat:read chat:list".into(),
        own: None,
        lrole: None,
    }
}

fn sign(kid: &str, alg: Algorithm, key: &EncodingKey, claims: &Claims) -> String {
    let header = jsonwebtoken::Header {
        typ: Some(TYPE.into()),
        kid: Some(kid.into()),
        ..jsonwebtoken::Header::new(alg.jose())
    };
    jsonwebtoken::encode(&header, claims, key).unwrap()
}

fn es256(claims: &Claims) -> String {
    sign("es", Algorithm::ES256, &Algorithm::ES256.signing_key(&[7; 32]).unwrap(), claims)
}

fn with(change: impl FnOnce(&mut Claims)) -> String {
    let mut claims = claims();
    change(&mut claims);
    es256(&claims)
}

impl World {
    fn ask(&mut self, method: &str, path: &str, credential: Credential<'_>) -> (Reason, bool) {
        let rules = Ruleset::try_from(self.rules.clone()).unwrap();
        let state = if self.stale { State::Stale(&rules) } else { State::Fresh(&rules) };
        let request = Request { method: method.as_bytes(), path: path.as_bytes(), credential, client: None };
        let judge = Judge {
            cache: &mut self.cache,
            meter: (),
            revocations: &self.revoked,
            now: self.now,
            trace: &mut (),
        };
        let decision = decide(state, request, judge);
        let forwarded = decision.verdict == Verdict::Forward;
        assert_eq!(forwarded, decision.reason.refusal().is_none() || decision.shadowed);
        (decision.reason, forwarded)
    }

    fn get(&mut self, path: &str, token: &str) -> Reason {
        self.ask("GET", path, Credential::One(token.as_bytes())).0
    }
}

#[test]
fn a_good_key_passes_first_and_remembered() {
    let mut world = world();
    let token = es256(&claims());
    assert_eq!(world.get("/chat?q=1", &token), Reason::Allowed);
    assert_eq!(world.cache.len(), 1);
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    let hs = sign("hs", Algorithm::HS256, &EncodingKey::from_secret(&[9; 32]), &claims());
    assert_eq!(world.get("/chat", &hs), Reason::Allowed);
}

#[test]
fn the_cheapest_refusal_comes_first() {
    let mut world = world();
    assert_eq!(world.ask("GET", "/", Credential::Many).0, Reason::Public);
    assert_eq!(world.ask("GET", "/nowhere", Credential::Many).0, Reason::NoRoute);
    assert_eq!(world.ask("GET", "/chat", Credential::None).0, Reason::MissingCredential);
    assert_eq!(world.ask("GET", "/chat", Credential::Many).0, Reason::TooManyCredentials);
    world.stale = true;
    assert_eq!(world.ask("GET", "/chat", Credential::None).0, Reason::MissingCredential);
    assert_eq!(world.get("/chat", "junk"), Reason::StaleState);
    assert_eq!(world.get("/", ""), Reason::StaleState);
    assert_eq!(world.get("/lax", "junk"), Reason::Malformed);
    assert_eq!(world.get("/lax", &es256(&claims())), Reason::Allowed);
}

#[test]
fn without_a_state_nothing_passes() {
    native::install();
    let request = Request { method: b"GET", path: b"/", credential: Credential::None, client: None };
    let mut cache = TokenCache::new(0);
    let revoked = ExactSet::default();
    let judge = Judge { cache: &mut cache, meter: (), revocations: &revoked, now: 0, trace: &mut () };
    let decision = decide(State::Missing, request, judge);
    assert_eq!(decision.verdict, Verdict::Refuse(Refusal::Unavailable));
}

#[test]
fn every_claim_is_checked_also_of_a_remembered_key() {
    let mut world = world();
    for (token, want) in [
        (with(|c| c.iss = "other".into()), Reason::WrongIssuer),
        (with(|c| c.exp = NOW), Reason::Expired),
        (with(|c| c.exp = NOW + 1), Reason::Allowed),
        (with(|c| c.iat = NOW), Reason::Allowed),
        (with(|c| c.iat = NOW + 1), Reason::NotYetValid),
        (with(|c| c.nbf = Some(NOW + 1)), Reason::NotYetValid),
        (with(|c| (c.iat, c.exp) = (NOW, NOW + 1_000)), Reason::Allowed),
        (with(|c| (c.iat, c.exp) = (NOW, NOW + 1_001)), Reason::LifeTooLong),
        (with(|c| c.aud = Some("x".into())), Reason::Allowed),
    ] {
        assert_eq!(world.get("/chat", &token), want);
        assert_eq!(world.get("/chat", &token), want, "remembered");
    }
    let token = es256(&claims());
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.now = NOW + 99;
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.now = NOW + 100;
    assert_eq!(world.get("/chat", &token), Reason::Expired);
    world.rules.leeway_s = 5;
    world.now = NOW + 104;
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.now = NOW + 105;
    assert_eq!(world.get("/chat", &token), Reason::Expired);
    world.now = NOW;
    assert_eq!(world.get("/chat", &token), Reason::Allowed, "the clock was set back");
    world.rules.expired_until = NOW + 99;
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.rules.expired_until = NOW + 100;
    assert_eq!(world.get("/chat", &token), Reason::Expired, "what expired once has expired for ever");
    world.rules.expired_until = 0;
    world.rules.audience = Some("api".into());
    assert_eq!(world.get("/chat", &token), Reason::WrongAudience);
    assert_eq!(world.get("/chat", &with(|c| c.aud = Some("api".into()))), Reason::Allowed);
}

#[test]
fn the_signature_is_that_of_the_kids_own_key_and_algorithm() {
    let mut world = world();
    let es = Algorithm::ES256.signing_key(&[7; 32]).unwrap();
    let other = Algorithm::ES256.signing_key(&[8; 32]).unwrap();
    let claims = claims();
    assert_eq!(world.get("/chat", &sign("es", Algorithm::ES256, &other, &claims)), Reason::BadSignature);
    assert_eq!(world.get("/chat", &sign("gone", Algorithm::ES256, &es, &claims)), Reason::UnknownKid);
    assert_eq!(world.get("/chat", &sign("hs", Algorithm::ES256, &es, &claims)), Reason::AlgorithmMismatch);
    let point = native::p256_point(&[7; 32]).unwrap();
    let confused = sign("es", Algorithm::HS256, &EncodingKey::from_secret(&point), &claims);
    assert_eq!(world.get("/chat", &confused), Reason::AlgorithmMismatch);
    assert!(world.cache.is_empty(), "only good tokens are remembered");

    let good = es256(&claims);
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let stranger = with(|c| c.role = "admin".into());
    let spliced = format!("{}.{signature}", stranger.rsplit_once('.').unwrap().0);
    assert_eq!(world.get("/chat", &spliced), Reason::BadSignature);
    assert_eq!(world.get("/chat", &format!("{signed}.{}", "A".repeat(86))), Reason::BadSignature);
}

#[test]
fn where_ids_are_keyed_a_made_up_one_is_refused_whatever_the_signature() {
    let mut world = world();
    let jti_key = JtiKey::new(&[5; 32]).unwrap();
    let genuine = Claims { jti: jti_key.make([1; 16]), ..claims() };
    let made_up = Claims { jti: JtiKey::new(&[6; 32]).unwrap().make([1; 16]), ..claims() };
    let (genuine, made_up) = (es256(&genuine), es256(&made_up));
    assert_eq!(world.get("/chat", &made_up), Reason::Allowed, "as long as ids are not keyed");
    world.cache = TokenCache::new(100_000);
    world.rules.keys[0].jti_key = Some(Secret::new(vec![5; 32]));
    assert_eq!(world.get("/chat", &made_up), Reason::ForgedId);
    assert_eq!(world.get("/chat", &es256(&claims())), Reason::ForgedId);
    assert!(world.cache.is_empty());
    assert_eq!(world.get("/chat", &genuine), Reason::Allowed);
    // A genuine id alone opens nothing.
    let signed = genuine.rsplit_once('.').unwrap().0;
    assert_eq!(world.get("/chat", &format!("{signed}.{}", "A".repeat(86))), Reason::BadSignature);
    let hs = sign("hs", Algorithm::HS256, &EncodingKey::from_secret(&[9; 32]), &claims());
    assert_eq!(world.get("/chat", &hs), Reason::Allowed, "another secret, whose ids are not keyed");
    world.rules.keys[0].jti_key = Some(Secret::new(vec![5; 31]));
    assert!(Ruleset::try_from(world.rules).is_err());
}

#[test]
fn a_secret_that_is_gone_or_changed_ends_remembered_keys_too() {
    let mut world = world();
    let token = es256(&claims());
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.rules.keys[0].not_after = Some(NOW + 1);
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.now = NOW + 1;
    assert_eq!(world.get("/chat", &token), Reason::UnknownKid);
    world.rules.keys[0].not_after = None;
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.rules.keys[0].material = Secret::new(native::p256_point(&[8; 32]).unwrap());
    assert_eq!(world.get("/chat", &token), Reason::BadSignature);
    world.rules.keys.remove(0);
    assert_eq!(world.get("/chat", &token), Reason::UnknownKid);
}

#[test]
fn revocation_suspension_cutoffs_and_lockdown_end_a_remembered_key() {
    let mut world = world();
    let token = es256(&claims());
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    let f = Fingerprint::of("jti-1");
    world.revoked.apply(Op::Suspend(f));
    assert_eq!(world.get("/chat", &token), Reason::Suspended);
    world.revoked.apply(Op::Resume(f));
    assert_eq!(world.get("/chat", &token), Reason::Allowed);
    world.rules.cutoffs.push(Cutoff {
        id: "c1".into(),
        scope: Scope { role: Some("basic".into()), ..Scope::default() },
        created_before: NOW,
        created_after: 0,
        excluded_key: None,
    });
    assert_eq!(world.get("/chat", &token), Reason::Cutoff);
    world.rules.lockdown = Some(Lockdown { until: NOW + 1, exempt_roles: vec!["admin".into()] });
    assert_eq!(world.get("/chat", &token), Reason::Lockdown);
    assert_eq!(world.get("/staff", &with(|c| c.role = "admin".into())), Reason::Allowed);
    world.rules.lockdown = None;
    world.rules.cutoffs.clear();
    world.revoked.apply(Op::Revoke(f));
    assert_eq!(world.get("/chat", &token), Reason::Revoked);
}

/// A cut-off, and whom it is about said a second time: by what a person would look at.
#[derive(Debug)]
struct Rule {
    cutoff: Cutoff,
    about: fn(&Claims, &str) -> bool,
}

/// The same window for every kind of scope.
fn rules_of_every_scope(created_after: u64, created_before: u64) -> Vec<Rule> {
    let rule = |id: &str, [role, owner, kid]: [Option<&str>; 3], about| Rule {
        cutoff: Cutoff {
            id: format!("{id} {created_after}..{created_before}"),
            scope: Scope {
                role: role.map(Into::into),
                owner: owner.map(Into::into),
                kid: kid.map(Into::into),
            },
            created_before,
            created_after,
            excluded_key: None,
        },
        about,
    };
    vec![
        rule("all", [None, None, None], |_, _| true),
        rule("role", [Some("basic"), None, None], |claims, _| claims.role == "basic"),
        rule("owner", [None, Some("acme"), None], |claims, _| claims.own == Some("acme".into())),
        rule("kid", [None, None, Some("hs")], |_, kid| kid == "hs"),
        rule("role and owner", [Some("basic"), Some("acme"), None], |claims, _| {
            claims.role == "basic" && claims.own == Some("acme".into())
        }),
    ]
}

impl Rule {
    fn ends(&self, claims: &Claims, kid: &str) -> bool {
        let Cutoff { created_before, created_after, excluded_key, .. } = &self.cutoff;
        let spared = excluded_key.as_ref() == Some(&claims.sub);
        !spared && (self.about)(claims, kid) && claims.iat >= *created_after && claims.iat < *created_before
    }
}

/// Keys of two roles, of an owner, another one and none, of two secrets, issued at each of `seconds`.
fn keys_issued_at(seconds: &[u64]) -> Vec<(Claims, &'static str, String)> {
    let mut keys = Vec::new();
    for iat in seconds {
        for role in ["basic", "contributor"] {
            for own in [Some("acme"), Some("other"), None] {
                for (kid, secret) in [("hs", [9; 32]), ("hs2", [10; 32])] {
                    let own = own.map(str::to_owned);
                    let claims = Claims { iat: *iat, role: role.into(), own, ..claims() };
                    let token = sign(kid, Algorithm::HS256, &EncodingKey::from_secret(&secret), &claims);
                    keys.push((claims, kid, token));
                }
            }
        }
    }
    keys
}

/// Asks about every key under two cut-offs in either order: it must be refused exactly when one of them by
/// itself ends it, which is the strictest of the two. How many were refused, and how many were asked about.
fn ask_under_both(world: &mut World, pair: [&Rule; 2], keys: &[(Claims, &str, String)]) -> (usize, usize) {
    let mut refused = 0;
    for [first, second] in [pair, [pair[1], pair[0]]] {
        world.rules.cutoffs = vec![first.cutoff.clone(), second.cutoff.clone()];
        let rules = Ruleset::try_from(world.rules.clone()).unwrap();
        for (claims, kid, token) in keys {
            let credential = Credential::One(token.as_bytes());
            let request = Request { method: b"GET", path: b"/chat", credential, client: None };
            let judge = Judge {
                cache: &mut world.cache,
                meter: (),
                revocations: &world.revoked,
                now: NOW,
                trace: &mut (),
            };
            let reason = decide(State::Fresh(&rules), request, judge).reason;
            let ended = first.ends(claims, kid) || second.ends(claims, kid);
            let wanted = if ended { Reason::Cutoff } else { Reason::Allowed };
            assert_eq!(reason, wanted, "{:?} {:?} {claims:?} {kid}", first.cutoff, second.cutoff);
            refused += usize::from(ended);
        }
    }
    (refused, 2 * keys.len())
}

fn world_of_two_secrets() -> World {
    let mut world = world();
    let other = VerificationKey { kid: "hs2".into(), ..world.rules.keys[1].clone() };
    world.rules.keys.push(VerificationKey { material: Secret::new(vec![10; 32]), ..other });
    world
}

#[test]
fn of_two_cutoffs_the_strictest_counts_to_the_second() {
    // One bound is the end of one window and the beginning of another.
    let [early, middle, late] = [NOW - 90, NOW - 60, NOW - 30];
    let windows = [(0, middle), (early, middle), (0, late), (middle, late)];
    let rules: Vec<Rule> =
        windows.iter().flat_map(|(after, before)| rules_of_every_scope(*after, *before)).collect();
    let seconds: Vec<u64> = [early, middle, late].iter().flat_map(|at| [at - 1, *at, at + 1]).collect();
    let mut world = world_of_two_secrets();
    let keys = keys_issued_at(&seconds);
    let (mut refused, mut asked) = (0, 0);
    for (place, first) in rules.iter().enumerate() {
        for second in &rules[place..] {
            let (under_both, of) = ask_under_both(&mut world, [first, second], &keys);
            assert!(under_both > 0 && under_both < of, "nothing is told by {first:?} {second:?}");
            refused += under_both;
            asked += of;
        }
    }
    assert_eq!(asked, 20 * 21 / 2 * 2 * 108);
    assert!(refused > asked / 10 && refused < asked * 9 / 10, "{refused} of {asked}");
}

#[test]
fn a_cutoff_excludes_a_key_from_itself_and_from_no_other() {
    let mut world = world_of_two_secrets();
    let keys = keys_issued_at(&[NOW - 61, NOW - 60]);
    let sparing = |rule: Rule, excluded_key: Option<&str>| Rule {
        cutoff: Cutoff { excluded_key: excluded_key.map(Into::into), ..rule.cutoff },
        ..rule
    };
    let excluded = [None, Some("key_1"), Some("key_2")];
    let rules: Vec<Rule> = excluded
        .into_iter()
        .flat_map(|excluded_key| {
            rules_of_every_scope(0, NOW - 60).into_iter().map(move |rule| sparing(rule, excluded_key))
        })
        .collect();
    let mut refused = Vec::new();
    for first in &rules {
        for second in &rules {
            refused.push(ask_under_both(&mut world, [first, second], &keys).0);
        }
    }
    // All keys are of `key_1`: only where both spare it does nothing end it.
    assert_eq!(refused.iter().filter(|refused| **refused == 0).count(), 5 * 5);
}

#[test]
fn what_revocation_cannot_answer_is_no_yes() {
    struct Unknown;
    impl Revocations for Unknown {
        fn standing(&mut self, _: Fingerprint) -> Standing {
            Standing::Unknown
        }
    }
    let world = world();
    let rules = Ruleset::try_from(world.rules).unwrap();
    let token = es256(&claims());
    let judge =
        Judge { cache: &mut TokenCache::new(0), meter: (), revocations: Unknown, now: NOW, trace: &mut () };
    let request = Request {
        method: b"GET",
        path: b"/chat",
        credential: Credential::One(token.as_bytes()),
        client: None,
    };
    let decision = decide(State::Fresh(&rules), request, judge);
    assert_eq!(decision.verdict, Verdict::Refuse(Refusal::Unavailable));

    let mut shadow = rules.clone();
    shadow.policy.mode = Mode::Shadow;
    let judge =
        Judge { cache: &mut TokenCache::new(0), meter: (), revocations: Unknown, now: NOW, trace: &mut () };
    let decision = decide(State::Fresh(&shadow), request, judge);
    assert_eq!((decision.verdict, decision.shadowed), (Verdict::Forward, true));
}

#[test]
fn a_state_serves_if_any_route_passes_with_it() {
    let mut world = world();
    let serves = |world: &World, age_ns: u64| {
        State::aged(&Ruleset::try_from(world.rules.clone()).unwrap(), age_ns).serves()
    };
    const HARD_AGE_NS: u64 = 300_000_000_000;
    assert!(!State::Missing.serves());
    assert!(serves(&world, HARD_AGE_NS), "a route allows stale");
    world.rules.policy.routes.retain(|route| route.stale == Stale::Deny);
    assert!(serves(&world, HARD_AGE_NS - 1));
    assert!(!serves(&world, HARD_AGE_NS));
    world.rules.policy.mode = Mode::Shadow;
    assert!(serves(&world, HARD_AGE_NS), "shadow mode refuses nothing");
}

#[test]
fn scopes_are_all_needed_and_whole_words_roles_one() {
    let mut world = world();
    assert_eq!(world.get("/both", &es256(&claims())), Reason::MissingScope);
    assert_eq!(world.get("/both", &with(|c| c.scope = "chat:write chat:read".into())), Reason::Allowed);
    assert_eq!(
        world.get("/chat", &with(|c| c.scope = "chat:readall xchat:read".into())),
        Reason::MissingScope
    );
    assert_eq!(world.get("/chat", &with(|c| c.scope = String::new())), Reason::MissingScope);
    assert_eq!(world.get("/staff", &es256(&claims())), Reason::WrongRole);
    assert_eq!(world.get("/staff", &with(|c| c.role = "staff".into())), Reason::Allowed);
}

#[test]
fn shadow_mode_refuses_nothing_and_says_what_it_would_have_done() {
    let mut world = world();
    world.rules.policy.mode = Mode::Shadow;
    assert_eq!(world.ask("GET", "/chat", Credential::None), (Reason::MissingCredential, true));
    assert_eq!(world.ask("GET", "/nowhere", Credential::None), (Reason::NoRoute, true));
    assert_eq!(world.ask("GET", "/chat", Credential::One(b"junk")), (Reason::Malformed, true));
    assert_eq!(world.get("/chat", &es256(&claims())), Reason::Allowed);
}

impl World {
    /// The identity headers of a request.
    fn forwarded(&mut self, path: &str, token: &str) -> Vec<String> {
        let rules = Ruleset::try_from(self.rules.clone()).unwrap();
        let request = Request {
            method: b"GET",
            path: path.as_bytes(),
            credential: Credential::One(token.as_bytes()),
            client: None,
        };
        let judge =
            Judge { cache: &mut self.cache, meter: (), revocations: &self.revoked, now: NOW, trace: &mut () };
        let decision = decide(State::Fresh(&rules), request, judge);
        Forwarded::of(&decision).headers().map(|(name, value)| format!("{name}={value}")).collect()
    }
}

#[test]
fn identity_is_forwarded_for_a_key_that_counts_and_only_then() {
    let mut world = world();
    assert_eq!(
        world.forwarded("/chat", &with(|c| c.own = Some("acme".into()))),
        [
            "x-keygate-version=v2",
            "x-keygate-key-id=key_1",
            "x-keygate-role=basic",
            "x-keygate-scopes=chat:read chat:list",
            "x-keygate-owner=acme",
        ]
    );
    assert_eq!(world.forwarded("/", &es256(&claims())), ["x-keygate-version=v2"]);
    assert_eq!(
        world.forwarded("/few", &es256(&claims())),
        ["x-keygate-version=v2", "x-keygate-key-id=key_1", "x-keygate-owner="]
    );
    assert_eq!(world.forwarded("/none", &es256(&claims())), ["x-keygate-version=v2"]);
    world.rules.policy.mode = Mode::Shadow;
    assert_eq!(
        world.forwarded("/both", &es256(&claims())).len(),
        1,
        "a key that would be refused identifies nobody"
    );
}

#[test]
fn labels_and_places_are_distinct() {
    let labels: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|r| r.label()).collect();
    assert_eq!(labels.len(), Reason::ALL.len());
    for (index, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(reason.index(), index);
    }
}

fn rollout(document: serde_json::Value) -> Rollout {
    serde_json::from_value(document).unwrap()
}

impl World {
    /// Where a request goes, precisely why, and what becomes of it.
    fn route(
        &mut self,
        path: &str,
        credential: Credential<'_>,
        client: &[u8],
    ) -> (ApiVersion, &'static str, Reason) {
        let rules = Ruleset::try_from(self.rules.clone()).unwrap();
        let state = if self.stale { State::Stale(&rules) } else { State::Fresh(&rules) };
        let request =
            Request { method: b"GET", path: path.as_bytes(), credential, client: ClientAddress::new(client) };
        let judge = Judge {
            cache: &mut self.cache,
            meter: (),
            revocations: &self.revoked,
            now: self.now,
            trace: &mut (),
        };
        let decision = decide(state, request, judge);
        (decision.choice.version, decision.choice.why.label(), decision.reason)
    }
}

#[test]
fn v1_gets_what_the_rollout_sends_there_untouched_and_v2_the_rest() {
    use ApiVersion::{V1, V2};
    let mut world = world();
    let token = es256(&claims());
    let forged = format!("{}A", &token[..token.len() - 1]);
    let foreign = with(|claims| claims.iss = "other".into());
    let revoked = with(|claims| claims.jti = "gone".into());
    world.revoked.apply(Op::Revoke(Fingerprint::of("gone")));
    let key = |token| Credential::One(str::as_bytes(token));
    let off = serde_json::json!({ "strategy": "off", "v1_retired": false });
    let canary = serde_json::json!({ "strategy": "canary", "canary_users": ["key_1"], "v1_retired": false });
    let full = serde_json::json!({ "strategy": "full", "v1_retired": false });
    for (document, path, credential, wanted) in [
        (&off, "/chat", key(&token), (V1, "off", Reason::V1)),
        (&off, "/chat", key(&revoked), (V1, "off", Reason::V1)),
        (&off, "/chat", Credential::None, (V1, "off", Reason::V1)),
        (&off, "/", Credential::None, (V1, "off", Reason::V1)),
        (&off, "/chat", key("legacy-1"), (V1, "off", Reason::V1)),
        (&off, "/nowhere", key(&token), (V2, "full", Reason::NoRoute)),
        (&canary, "/chat", key(&token), (V2, "canary_user", Reason::Allowed)),
        (&canary, "/chat", key(&forged), (V2, "canary_user", Reason::BadSignature)),
        (&canary, "/chat", key(&foreign), (V1, "legacy", Reason::V1)),
        (&canary, "/chat", Credential::Many, (V1, "legacy", Reason::V1)),
        (&canary, "/chat", Credential::None, (V1, "no_canary_user", Reason::V1)),
        (&full, "/chat", key(&token), (V2, "full", Reason::Allowed)),
        (&full, "/chat", key(&revoked), (V2, "full", Reason::Revoked)),
        (&full, "/chat", key("legacy-1"), (V1, "legacy", Reason::V1)),
        (&full, "/chat", Credential::None, (V2, "full", Reason::MissingCredential)),
    ] {
        world.rules.rollout = rollout(document.clone());
        let route = world.route(path, credential, b"10.0.0.1");
        assert_eq!(route, wanted, "{document} {path} {credential:?}");
    }
}

#[test]
fn a_key_goes_the_same_way_remembered_or_not_and_by_its_owner() {
    let mut world = world();
    world.rules.rollout =
        rollout(serde_json::json!({ "strategy": "percentage", "share": 5_000, "v1_retired": false }));
    for number in 0..64 {
        let mut claims = claims();
        claims.sub = format!("key_{number}");
        claims.jti = format!("jti-{number}");
        claims.own = (number % 2 == 0).then(|| format!("owner-{}", number / 4));
        let token = es256(&claims);
        let mut ways: Vec<ApiVersion> = Vec::new();
        // Before it is verified, after, and after V2 has refused it.
        for _ in 0..3 {
            ways.push(world.route("/chat", Credential::One(token.as_bytes()), b"").0);
        }
        assert!(ways.iter().all(|way| *way == ways[0]), "{number}");
    }
    let stable = |world: &mut World, client: &[u8]| world.route("/", Credential::None, client).0;
    let clients: Vec<ApiVersion> = (0..64_u8).map(|number| stable(&mut world, &[10, 0, 0, number])).collect();
    assert!(clients.contains(&ApiVersion::V1) && clients.contains(&ApiVersion::V2));
    for (number, way) in (0..64_u8).zip(&clients) {
        assert_eq!(stable(&mut world, &[10, 0, 0, number]), *way);
    }
}

#[test]
fn shadow_mode_lets_v2_pass_what_it_refuses_and_leaves_v1_alone() {
    use ApiVersion::{V1, V2};
    let mut world = world();
    world.rules.policy.mode = Mode::Shadow;
    world.revoked.apply(Op::Revoke(Fingerprint::of("gone")));
    let canary = with(|claims| claims.jti = "gone".into());
    let other = with(|claims| {
        claims.sub = "key_2".into();
        claims.jti = "gone".into();
    });
    world.rules.rollout =
        rollout(serde_json::json!({ "strategy": "canary", "canary_users": ["key_1"], "v1_retired": false }));
    let rules = Ruleset::try_from(world.rules.clone()).unwrap();
    let mut tally = Tally::default();
    for (credential, version, reason, shadowed) in [
        (Credential::One(canary.as_bytes()), V2, Reason::Revoked, true),
        (Credential::One(other.as_bytes()), V1, Reason::V1, false),
        (Credential::One(b"legacy-1"), V1, Reason::V1, false),
    ] {
        let request = Request { method: b"GET", path: b"/chat", credential, client: None };
        let judge = Judge {
            cache: &mut world.cache,
            meter: (),
            revocations: &world.revoked,
            now: NOW,
            trace: &mut (),
        };
        let decision = decide(State::Fresh(&rules), request, judge);
        assert_eq!(decision.verdict, Verdict::Forward, "{credential:?}");
        assert_eq!(
            (decision.choice.version, decision.reason, decision.shadowed),
            (version, reason, shadowed)
        );
        let forwarded = Forwarded::of(&decision);
        let sent: Vec<_> = forwarded.headers().collect();
        assert_eq!(
            sent,
            [("x-keygate-version", version.label())],
            "who is refused, or V1's, has no identity"
        );
        tally.decided(&decision);
    }
    let counts = tally.counts();
    let counted: Vec<_> = counts.iter().collect();
    assert_eq!(counted, [("decision revoked read basic", 1), ("decision v1 read ", 2)]);
}

#[test]
fn v1_does_not_wait_for_a_state_that_is_fresh() {
    let mut world = world();
    world.stale = true;
    world.rules.rollout = rollout(serde_json::json!({ "strategy": "off", "v1_retired": false }));
    let token = es256(&claims());
    assert_eq!(world.route("/chat", Credential::One(token.as_bytes()), b"").2, Reason::V1);
}

/// Lets so many pass of each account.
struct Purse(std::collections::HashMap<u64, u32>);

impl Meter for &mut Purse {
    fn spend(&mut self, account: u64, limit: Limit, cost: u32) -> Metered {
        let spent = self.0.entry(account).or_default();
        let left = |remaining| Left { limit, remaining, reset_s: 1 };
        if *spent + cost > limit.units {
            return Metered::Beyond(left(0));
        }
        *spent += cost;
        Metered::Within(left(limit.units - *spent))
    }
}

#[test]
fn what_is_beyond_a_limit_is_refused_and_only_what_passes_is_counted() {
    let mut world = world();
    world.rules.limits.roles.insert("basic".into(), Limit { units: 3, window_s: 60 });
    world.rules.limits.public = Some(Limit { units: 2, window_s: 60 }.into());
    world.rules.policy.routes[1].cost = 2;
    let rules = Ruleset::try_from(world.rules.clone()).unwrap();
    let mut purse = Purse(std::collections::HashMap::new());
    let mut ask = |path: &str, credential: Credential<'_>, client: &[u8]| {
        let request =
            Request { method: b"GET", path: path.as_bytes(), credential, client: ClientAddress::new(client) };
        let (cache, revocations) = (&mut world.cache, &world.revoked);
        let judge = Judge { cache, meter: &mut purse, revocations, now: NOW, trace: &mut () };
        let decision = decide(State::Fresh(&rules), request, judge);
        (decision.reason, decision.left.map(|left| left.remaining))
    };
    let (one, other) = (es256(&claims()), with(|claims| claims.sub = "key_2".into()));
    let admin = with(|claims| claims.role = "admin".into());
    let key = |token| Credential::One(str::as_bytes(token));
    assert_eq!(ask("/chat", key(&one), b""), (Reason::Allowed, Some(1)));
    assert_eq!(ask("/both", key(&one), b""), (Reason::MissingScope, None), "that is not counted");
    assert_eq!(ask("/chat", key(&one), b""), (Reason::RateLimited, Some(0)), "it costs two");
    assert_eq!(ask("/lax", key(&one), b""), (Reason::Allowed, Some(0)));
    assert_eq!(ask("/lax", key(&one), b""), (Reason::RateLimited, Some(0)));
    assert_eq!(ask("/chat", key(&other), b""), (Reason::Allowed, Some(1)), "each key for itself");
    assert_eq!(ask("/chat", key(&admin), b""), (Reason::Allowed, None), "unlimited");
    assert_eq!(ask("/", Credential::None, b"10.0.0.1"), (Reason::Public, Some(1)));
    assert_eq!(ask("/", Credential::None, b"10.0.0.1"), (Reason::Public, Some(0)));
    assert_eq!(ask("/", Credential::None, b"10.0.0.1"), (Reason::RateLimited, Some(0)));
    assert_eq!(ask("/", Credential::None, b"10.0.0.2"), (Reason::Public, Some(1)));
}

#[test]
fn keys_of_an_owner_share_the_limit_of_their_limit_role() {
    let mut world = world();
    world.rules.limits.roles.insert("basic".into(), Limit { units: 3, window_s: 60 });
    world.rules.limits.roles.insert("staff".into(), Limit { units: 5, window_s: 60 });
    let rules = Ruleset::try_from(world.rules.clone()).unwrap();
    let mut purse = Purse(std::collections::HashMap::new());
    let mut left = |key_id: &str, owner: Option<&str>, limit_role: Option<&str>| {
        let token = with(|claims| {
            claims.sub = key_id.into();
            claims.own = owner.map(Into::into);
            claims.lrole = limit_role.map(Into::into);
        });
        let credential = Credential::One(token.as_bytes());
        let request = Request { method: b"GET", path: b"/lax", credential, client: None };
        let (cache, revocations) = (&mut world.cache, &world.revoked);
        let judge = Judge { cache, meter: &mut purse, revocations, now: NOW, trace: &mut () };
        let decision = decide(State::Fresh(&rules), request, judge);
        (decision.reason == Reason::Allowed).then(|| decision.left.map(|left| left.remaining).unwrap())
    };
    assert_eq!(left("key_1", None, None), Some(2));
    assert_eq!(left("key_2", Some("key_1"), None), Some(1), "made by key_1, or renews it");
    assert_eq!(left("key_2", Some("key_1"), None), Some(0), "remembered");
    assert_eq!(left("key_1", None, None), None);
    assert_eq!(left("key_3", None, None), Some(2), "another one");
    assert_eq!(left("key_4", None, Some("staff")), Some(4));
    assert_eq!(left("key_5", Some("key_4"), Some("staff")), Some(3));
    assert_eq!(left("key_6", Some("acme"), None), Some(2));
    assert_eq!(left("key_7", Some("acme"), None), Some(1));
    assert_eq!(left("key_8", Some("acme"), Some("staff")), Some(4), "an account for each limit role");
}

#[test]
fn what_costs_nothing_is_not_counted_and_has_no_limit() {
    let mut world = world();
    let none = Limit { units: 0, window_s: 60 };
    world.rules.limits.roles.insert("basic".into(), none);
    world.rules.limits.public = Some(none.into());
    for cost in [0, 1] {
        for route in &mut world.rules.policy.routes {
            route.cost = cost;
        }
        let rules = Ruleset::try_from(world.rules.clone()).unwrap();
        let mut purse = Purse(std::collections::HashMap::new());
        let token = es256(&claims());
        for (path, credential, passes) in [
            ("/lax", Credential::One(token.as_bytes()), Reason::Allowed),
            ("/", Credential::None, Reason::Public),
        ] {
            let request = Request {
                method: b"GET",
                path: path.as_bytes(),
                credential,
                client: ClientAddress::new(b"10.0.0.1"),
            };
            let (cache, revocations) = (&mut world.cache, &world.revoked);
            let judge = Judge { cache, meter: &mut purse, revocations, now: NOW, trace: &mut () };
            let decision = decide(State::Fresh(&rules), request, judge);
            let expected = if cost == 0 { passes } else { Reason::RateLimited };
            assert_eq!((decision.reason, decision.left.is_none()), (expected, cost == 0), "{path} {cost}");
        }
        assert_eq!(purse.0.is_empty(), cost == 0);
    }
}

#[test]
fn clients_are_counted_by_ipv4_address_and_ipv6_prefix() {
    let mut world = world();
    world.rules.limits.public = Some(Limit { units: 2, window_s: 60 }.into());
    let rules = Ruleset::try_from(world.rules.clone()).unwrap();
    let mut purse = Purse(std::collections::HashMap::new());
    let mut passes = |client: &str| {
        let client = ClientAddress::new(client.as_bytes());
        let request = Request { method: b"GET", path: b"/", credential: Credential::None, client };
        let (cache, revocations) = (&mut world.cache, &world.revoked);
        let judge = Judge { cache, meter: &mut purse, revocations, now: NOW, trace: &mut () };
        decide(State::Fresh(&rules), request, judge).reason == Reason::Public
    };
    assert!(passes("192.0.2.7") && passes("[::ffff:192.0.2.7]") && !passes("192.0.2.7"));
    assert!(passes("[2001:db8::1]") && passes("2001:db8::2") && !passes("[2001:db8::3]"));
    assert!(passes("2001:db8:0:1::1") && passes("") && passes("") && !passes(""));
}

//! The control plane that commands call, with the key in `KEYGATE_ADMIN_KEY`. The key is sent only to a control plane
//! that says that it issued it. No key is ever taken from the command line, where every user of the machine could read
//! it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use keygate_core::token;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::text;
use super::exit::{Exit, Failure};

/// Where a control plane says who it is.
const IDENTITY_PATH: &str = "/.well-known/keygate";
/// The file that `scripts/up` writes, in the directory that a command is run in or one above it.
const CONTEXT_FILE: &str = ".keygate/context.toml";
/// The longest wait that the API offers is 15 minutes.
const LONGEST_CALL: Duration = Duration::from_secs(16 * 60);
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(10);
const EXAMPLE: &str = "http://localhost:8000";

static URL: OnceLock<String> = OnceLock::new();
static SERVER: OnceLock<Server> = OnceLock::new();

/// Sets the URL that `--url` or `KEYGATE_URL` gives.
pub fn set_url(url: Option<String>) {
    if let Some(url) = url.filter(|url| !url.is_empty()) {
        let _set_once = URL.set(url);
    }
}

/// The context file's content.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    /// The control plane's API.
    url: String,
    /// Its fleet's id.
    fleet: Option<String>,
}

/// The control plane that is called.
#[derive(Debug)]
struct Server {
    url: String,
    /// The fleet's id by the context file, and that file.
    expected_fleet: Option<(String, PathBuf)>,
}

impl Server {
    fn find() -> anyhow::Result<Self> {
        if let Some(url) = URL.get() {
            return Ok(Self { url: checked(url, "--url (KEYGATE_URL)")?, expected_fleet: None });
        }
        let Some(file) = context_file()? else {
            let problem = format!(
                "no control plane is named: give --url or set KEYGATE_URL, such as {EXAMPLE}, or run this below a directory \
                 in which scripts/up has written {CONTEXT_FILE}"
            );
            return Err(Failure::error(Exit::Usage, problem));
        };
        let name = file.display().to_string();
        let content = std::fs::read_to_string(&file).with_context(|| name.clone())?;
        let context: Context = toml::from_str(&content)
            .map_err(|error| Failure::error(Exit::Usage, format!("{name}: {}", error.message())))?;
        Ok(Self {
            url: checked(&context.url, &name)?,
            expected_fleet: context.fleet.map(|fleet| (fleet, file)),
        })
    }
}

/// A URL without a slash at its end.
fn checked(url: &str, source: &str) -> anyhow::Result<String> {
    let is_url = url.split_once("://").is_some_and(|(scheme, rest)| {
        ["http", "https"].contains(&scheme) && !rest.is_empty() && !rest.starts_with('/')
    });
    if is_url {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    Err(Failure::error(Exit::Usage, format!("{source}: {url:?} is no URL, such as {EXAMPLE}")))
}

/// The context file nearest to the working directory. One that belongs to another user is refused: it would say where
/// the key is sent.
fn context_file() -> anyhow::Result<Option<PathBuf>> {
    let here = std::env::current_dir().context("the working directory")?;
    let Some(file) = here.ancestors().map(|at| at.join(CONTEXT_FILE)).find(|file| file.is_file()) else {
        return Ok(None);
    };
    let owner = owner_of(&file)?;
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        let problem = format!("{} belongs to another user; give --url or set KEYGATE_URL", file.display());
        return Err(Failure::error(Exit::Usage, problem));
    }
    Ok(Some(file))
}

fn owner_of(file: &Path) -> anyhow::Result<u32> {
    Ok(file.metadata().with_context(|| file.display().to_string())?.uid())
}

fn server() -> anyhow::Result<&'static Server> {
    if SERVER.get().is_none() {
        let _set_once = SERVER.set(Server::find()?);
    }
    Ok(SERVER.get().expect("it was set"))
}

/// The URL of the control plane, for messages.
pub fn name() -> &'static str {
    SERVER.get().map_or("the control plane", |server| server.url.as_str())
}

/// Calls the API; anything but success is an error with the API's own sentence.
pub fn call(
    method: &str,
    path: &str,
    query: &[(&str, String)],
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    let key = std::env::var("KEYGATE_ADMIN_KEY").map_err(|_| {
        Failure::error(
            Exit::Usage,
            "KEYGATE_ADMIN_KEY is not set; for the first key: export KEYGATE_ADMIN_KEY=$(cat .keygate/admin.key)",
        )
    })?;
    call_as(&key, method, path, query, body)
}

/// The same with another key.
pub fn call_as(
    key: &str,
    method: &str,
    path: &str,
    query: &[(&str, String)],
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    let server = server()?;
    let key = key.trim();
    check_issued_by(server, key)?;
    let agent = agent(LONGEST_CALL);
    let url = &server.url;
    let target = format!("{url}{path}");
    let bearer = format!("Bearer {key}");
    let query = query.iter().map(|(name, value)| (*name, value.as_str()));
    let sent = match (method, body) {
        ("GET", _) => agent.get(&target).query_pairs(query).header("authorization", bearer).call(),
        ("DELETE", Some(body)) => agent
            .delete(&target)
            .query_pairs(query)
            .header("authorization", bearer)
            .force_send_body()
            .send_json(body),
        ("DELETE", None) => agent.delete(&target).query_pairs(query).header("authorization", bearer).call(),
        ("PUT", Some(body)) => {
            agent.put(&target).query_pairs(query).header("authorization", bearer).send_json(body)
        }
        (_, body) => agent
            .post(&target)
            .query_pairs(query)
            .header("authorization", bearer)
            .send_json(body.unwrap_or(&json!({}))),
    };
    let mut response = sent.with_context(|| not_reached(url))?;
    let status = response.status();
    let answer: Value =
        response.body_mut().read_json().with_context(|| format!("{url} answered {status} without JSON"))?;
    if status.is_success() { Ok(answer) } else { Err(refusal(url, status.as_u16(), &answer)) }
}

fn agent(timeout: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        // A redirect would take the key to another server.
        .max_redirects(0)
        .timeout_global(Some(timeout))
        .build()
        .into()
}

fn not_reached(url: &str) -> String {
    format!("{url}: is the control plane running? (--url or KEYGATE_URL says where)")
}

/// An error of the API.
fn refusal(url: &str, status: u16, answer: &Value) -> anyhow::Error {
    let code = text(answer, "code");
    let detail = text(answer, "detail");
    let exit = match status {
        400 | 405 | 413 | 422 => Exit::Usage,
        401 | 403 => Exit::Refused,
        _ => Exit::Failed,
    };
    let text = match code.as_str() {
        "invalid_token" | "missing_credential" => {
            format!("the key in KEYGATE_ADMIN_KEY is not accepted by {url} ({code})")
        }
        _ if answer["errors"].as_array().is_some_and(|errors| errors.len() > 1) => {
            let errors = answer["errors"].as_array().into_iter().flatten();
            let errors: Vec<String> = errors.filter_map(Value::as_str).map(ToOwned::to_owned).collect();
            format!("{url}: {detail} ({status}, {code})\n  {}", errors.join("\n  "))
        }
        _ => format!("{url}: {detail} ({status}, {code})"),
    };
    Failure::error(exit, text)
}

/// A control plane's own account of itself.
#[derive(Debug, Deserialize)]
struct Identity {
    issuer: String,
    fleet: String,
    /// Ids of the secrets whose keys it accepts.
    secrets: Vec<String>,
}

/// Asks the server who it is, without the key, and refuses to send the key to one that did not issue it. That stops
/// mistakes; against a server that lies there is TLS.
fn check_issued_by(server: &Server, key: &str) -> anyhow::Result<()> {
    /// The key that was checked last: a command calls many times with one key, and seldom with a second.
    static CHECKED: Mutex<String> = Mutex::new(String::new());
    let mut checked = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    if *checked == key {
        return Ok(());
    }
    let url = &server.url;
    let refused = |problem: String| Failure::error(Exit::Refused, problem);
    let token = token::read(key.as_bytes()).map_err(|_| {
        refused(format!("KEYGATE_ADMIN_KEY holds no key of Keygate; nothing was sent to {url}"))
    })?;
    let identity = identity(url)?;
    if let Some((fleet, file)) = &server.expected_fleet
        && *fleet != identity.fleet
    {
        return Err(refused(format!(
            "{url} is another control plane than the one that {} names (fleet {} instead of {fleet}); the key was not sent",
            file.display(),
            identity.fleet,
        )));
    }
    if token.claims.iss != identity.issuer || !identity.secrets.contains(&token.kid) {
        return Err(refused(format!(
            "{url} did not issue the key in KEYGATE_ADMIN_KEY, or its secret has ended; the key was not sent. Name the \
             control plane that issued it with --url or KEYGATE_URL"
        )));
    }
    key.clone_into(&mut checked);
    Ok(())
}

fn identity(url: &str) -> anyhow::Result<Identity> {
    let answer = agent(IDENTITY_TIMEOUT).get(format!("{url}{IDENTITY_PATH}")).call();
    let mut response = answer.with_context(|| not_reached(url))?;
    let status = response.status().as_u16();
    let read = if status == 200 { response.body_mut().read_json().ok() } else { None };
    read.with_context(|| {
        format!(
            "{url} is no control plane of Keygate: it answered {status} to GET {IDENTITY_PATH}. The key was not sent; --url or \
             KEYGATE_URL names the control plane"
        )
    })
}

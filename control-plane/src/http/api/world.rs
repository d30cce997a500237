//! A control plane for tests of the API: in a directory of its own, at a time that the test sets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, header};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::app::{self, RunError, Serving};
use crate::config;
use crate::platform::clock::Clock;

pub struct World {
    pub serving: Serving,
    now_s: Arc<AtomicU64>,
    /// The key of the first operator.
    pub admin: String,
    settings: String,
    directory: tempfile::TempDir,
}

impl World {
    /// One with these settings, lines of `keygate.toml`.
    pub async fn new(settings: &str) -> Self {
        Self::try_new(settings).await.unwrap()
    }

    /// The same, where it may not start.
    pub async fn try_new(settings: &str) -> Result<Self, RunError> {
        let directory = tempfile::tempdir().unwrap();
        let now_s = Arc::new(AtomicU64::new(1_000_000_000));
        let serving = start(&directory, settings, &now_s).await?;
        let admin = std::fs::read_to_string(&serving.app.config.admin_key_file).unwrap().trim().to_owned();
        Ok(Self { serving, now_s, admin, settings: settings.to_owned(), directory })
    }

    pub fn pass(&self, seconds: u64) {
        self.now_s.fetch_add(seconds, Ordering::Relaxed);
    }

    /// Stops it and starts it again.
    pub async fn restart(self) -> Self {
        let Self { serving, now_s, admin, settings, directory } = self;
        serving.run(std::future::ready(())).await;
        let serving = start(&directory, &settings, &now_s).await.unwrap();
        Self { serving, now_s, admin, settings, directory }
    }

    pub async fn call(&self, method: &str, path: &str, key: &str, body: Value) -> (u16, Value) {
        let (status, _, body) = self.ask_for(method, path, key, body, &[]).await;
        (status, body)
    }

    /// The same with more headers, and with the headers of the answer.
    pub async fn ask_for(
        &self,
        method: &str,
        path: &str,
        key: &str,
        body: Value,
        headers: &[(&str, &str)],
    ) -> (u16, HeaderMap, Value) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {key}"));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.body(Body::from(body.to_string())).unwrap();
        let response = super::router(Arc::clone(&self.serving.app)).oneshot(request).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, headers, serde_json::from_slice(&bytes).unwrap())
    }

    /// Issues a key: the key, and its id.
    pub async fn issue_with_id(&self, role: &str) -> (String, String) {
        let (status, key) = self.register(&self.admin, json!({ "name": "n", "role": role })).await;
        assert_eq!(status, 201, "{key}");
        let text = |member: &str| key[member].as_str().unwrap().to_owned();
        (text("api_key"), text("key_id"))
    }

    pub async fn issue(&self, role: &str) -> String {
        self.issue_with_id(role).await.0
    }

    pub async fn register(&self, key: &str, body: Value) -> (u16, Value) {
        self.call("POST", "/api/auth/register", key, body).await
    }
}

async fn start(
    directory: &tempfile::TempDir,
    settings: &str,
    now_s: &Arc<AtomicU64>,
) -> Result<Serving, RunError> {
    let typed = format!("listen = \"127.0.0.1:0\"\nsync_listen = \"127.0.0.1:0\"\n{settings}");
    let data = directory.path().join("data").display().to_string();
    let config = config::read(&typed, &[("data_dir", data, "test".into())]).unwrap();
    let clock = Arc::clone(now_s);
    let clock = Clock::from_fn(move || clock.load(Ordering::Relaxed) * 1_000);
    app::start(config, clock, app::FromEnvironment::default()).await
}

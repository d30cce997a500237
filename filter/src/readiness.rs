//! The answer of a worker to load balancers that ask whether it is ready.

use crate::host;
use crate::plugin::Plugin;
use crate::response::Response;

/// Where a worker says whether it is ready, for load balancers.
const READY_PATH: &[u8] = b"/.keygate/ready";

/// Whether a request asks for it.
pub fn is_asked(method: &[u8], path: &[u8]) -> bool {
    matches!(method, b"GET" | b"HEAD") && path.split(|byte| *byte == b'?').next() == Some(READY_PATH)
}

impl Plugin {
    /// 200 with the version that is enforced, or the refusal of a worker that cannot decide.
    pub fn ready(&mut self, now_ns: u64) -> Response {
        match self.replica.ready(&mut host::Shared, now_ns) {
            Some(version) => Response {
                status: 200,
                headers: vec![("content-type", "application/json".into())],
                body: format!("{{\"ready\":true,\"version\":\"{version}\"}}\n"),
            },
            None => Response::unavailable(),
        }
    }
}

//! HTTP: the API of operators and clients, and the sync port of proxies. Handlers parse a request, call, and shape the answer.

pub mod api;
pub mod problem;
pub mod sync;

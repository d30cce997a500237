//! The demo upstream: answers every request with what it received.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::net::TcpListener;

const USAGE: &str = "usage: demo-upstream [--listen ADDRESS:PORT] [--name NAME]";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (mut listen, mut name) = ("127.0.0.1:10002".to_owned(), "v2".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--listen", Some(value)) => listen = value,
            ("--name", Some(value)) => name = value,
            _ => fail(USAGE),
        }
    }
    let listener = match TcpListener::bind(&listen).await {
        Ok(listener) => listener,
        Err(error) => fail(&format!("cannot listen on {listen}: {error}")),
    };
    eprintln!("demo upstream {name} listens on {listen}");
    match keygate_e2e::upstream::serve(listener, name, Arc::new(AtomicU64::new(0))).await {}
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(2);
}

//! The demo upstreams: V2 answers every request with what it received; V1, which was there before, checks keys by itself.

use keygate_e2e::upstream::{Behaviour, serve};
use tokio::net::TcpListener;

const USAGE: &str = "usage: demo-upstream [--listen ADDRESS:PORT] [--v1-listen ADDRESS:PORT]";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (mut v2, mut v1) = ("127.0.0.1:10002".to_owned(), "127.0.0.1:10001".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--listen", Some(value)) => v2 = value,
            ("--v1-listen", Some(value)) => v1 = value,
            _ => fail(USAGE),
        }
    }
    let (v2, v1) = (bind(&v2, "v2").await, bind(&v1, "v1").await);
    tokio::spawn(serve(v1, Behaviour::of("v1")));
    match serve(v2, Behaviour::of("v2")).await {}
}

async fn bind(address: &str, name: &str) -> TcpListener {
    match TcpListener::bind(address).await {
        Ok(listener) => {
            eprintln!("demo upstream {name} listens on {address}");
            listener
        }
        Err(error) => fail(&format!("cannot listen on {address}: {error}")),
    }
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(2);
}

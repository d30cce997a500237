//! How many instructions a request takes in Envoy, and where: callgrind counts those of the whole process, WebAssembly's
//! included, so that it does not matter what else the machine does. The kernel's are not among them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use keygate_e2e::durability::Dice;
use keygate_e2e::wait::pass;
use serde_json::{Value, json};

use super::bed::{Bed, Under};
use super::client::Client;
use super::cost::CONNECTIONS;
use super::cpu::{self, Cpus};
use super::tokens::Tokens;
use super::variant::{ALL, Load, Variant};
use super::{SEED, number};

/// A variant. Fifty times as slow as without callgrind.
const REQUESTS: usize = 1_000;
/// Before that, not counted: until V8 has optimised what runs often.
const WARM_UP: usize = 6_000;
/// For how long it is watched while there are no requests.
const IDLE: std::time::Duration = std::time::Duration::from_secs(5);
/// What the border between Envoy and WebAssembly is crossed with, as Envoy's functions are called.
const CROSSINGS: &str = "proxy_wasm::exports::";
/// Those that make up less of a request are not shown.
const LEAST: f64 = 300.0;

/// What was counted of a variant.
struct Counted {
    per_request: f64,
    /// Of the functions that WebAssembly calls, with all that they call.
    crossings: Vec<(String, f64)>,
}

pub fn run() {
    let [requests, seed] = [("KEYGATE_REQUESTS", REQUESTS), ("KEYGATE_SEED", SEED)]
        .map(|(name, usual)| number(name).unwrap_or(usual));
    let mut dice = Dice::new(seed as u64);
    let cpus = Cpus::find();
    println!("setting up");
    let (bed, prepared) = Bed::start(cpus, &mut dice, Under::Callgrind);
    let mut tokens =
        Tokens::new(&bed.api(), dice.split(), prepared.owners, &prepared.signer, &prepared.eddsa);
    tokens.have_new(&bed.api(), 3 * (requests + WARM_UP));
    cpu::pin_this_thread(cpus.rest);
    let callgrind = Callgrind { process: bed.envoy_id(), directory: bed.directory().to_owned() };

    let wanted = |variant: &&Variant| !variant.aside && variant.name != "ext_authz";
    let mut counted = Vec::new();
    for variant in ALL.iter().filter(wanted) {
        counted.push((variant.name, of(&bed, &tokens, &callgrind, variant, requests)));
        let (name, counted) = counted.last().expect("one was added");
        println!("  {name:<18} {:8.0} instructions", counted.per_request);
    }
    bed.assert_no_vm_died();
    print(&counted);
    crate::write("profile", &figures(&counted, requests));
}

fn of(bed: &Bed, tokens: &Tokens, callgrind: &Callgrind, variant: &Variant, requests: usize) -> Counted {
    let mut client = Client::connect(bed.port(variant.listener), CONNECTIONS);
    // Few enough that all are remembered, wherever that is done.
    let draw = |count| match variant.load {
        Load::Known | Load::Es256 | Load::EdDsa => tokens.draw(variant.load, count),
        load => tokens.draw(load, count),
    };
    let warm_up = if variant.load == Load::Known { WARM_UP } else { WARM_UP / 4 };
    if variant.load == Load::Known {
        client.closed(tokens.every_known()).expect_right(variant.name);
    }
    client.closed(draw(warm_up).into_iter()).expect_right(variant.name);
    callgrind.watch();
    pass(IDLE);
    let idle = callgrind.instructions("idle") / IDLE.as_secs_f64();
    let shots = draw(requests);
    let begun = Instant::now();
    callgrind.zero();
    client.closed(shots.into_iter()).expect_right(variant.name);
    let took = begun.elapsed().as_secs_f64();
    let file = callgrind.dump(variant.name);
    callgrind.look_away();
    let each = |all: f64| all / requests as f64;
    let per_request = each(total(&file) - idle * took);
    let crossings = crossings(&file).into_iter().map(|(name, all)| (name, each(all)));
    Counted { per_request, crossings: crossings.filter(|(_, count)| *count >= LEAST).collect() }
}

/// The valgrind that Envoy runs under.
struct Callgrind {
    process: u32,
    directory: PathBuf,
}

impl Callgrind {
    fn control(&self, arguments: &[&str]) {
        let output = Command::new("callgrind_control").args(arguments).arg(self.process.to_string()).output();
        let output = output.expect("callgrind_control, which is of valgrind");
        assert!(output.status.success(), "callgrind_control: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Counts from now on.
    fn watch(&self) {
        self.control(&["--instr=on"]);
        self.zero();
    }

    fn look_away(&self) {
        self.control(&["--instr=off"]);
    }

    fn zero(&self) {
        self.control(&["--zero"]);
    }

    /// Writes down what was counted since the last time; where.
    fn dump(&self, name: &str) -> PathBuf {
        let of_it = || -> Vec<PathBuf> {
            let prefix = format!("{}.", Under::OUT);
            let entries = fs::read_dir(&self.directory).expect("the directory").flatten();
            let paths = entries.map(|entry| entry.path());
            paths
                .filter(|path| {
                    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
                })
                .collect()
        };
        self.control(&["--dump"]);
        let dumped = of_it().pop().expect("callgrind dumps");
        let kept = self.directory.join(format!("{name}.profile"));
        fs::rename(&dumped, &kept).expect("a dump");
        kept
    }

    fn instructions(&self, name: &str) -> f64 {
        total(&self.dump(name))
    }
}

/// The sum of a dump, of its last line of that kind.
fn total(file: &Path) -> f64 {
    let text = fs::read_to_string(file).expect("a dump");
    let of =
        |line: &str| line.strip_prefix("totals: ").or(line.strip_prefix("summary: "))?.trim().parse().ok();
    text.lines().rev().find_map(of).expect("a dump has its sum")
}

/// What the functions took that WebAssembly calls.
fn crossings(file: &Path) -> Vec<(String, f64)> {
    let output =
        Command::new("callgrind_annotate").args(["--inclusive=yes", "--threshold=100"]).arg(file).output();
    let text = String::from_utf8_lossy(&output.expect("callgrind_annotate, which is of valgrind").stdout)
        .into_owned();
    let mut found: Vec<(String, f64)> = Vec::new();
    for line in text.lines() {
        let Some((numbers, name)) = line.split_once(CROSSINGS) else { continue };
        let count: String =
            numbers.split('(').next().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
        let name = name.split(['(', '<', ' ', '[']).next().unwrap_or_default();
        let Ok(count) = count.parse() else { continue };
        if !name.is_empty() && found.iter().all(|(other, _)| other != name) {
            found.push((name.to_owned(), count));
        }
    }
    found
}

fn print(counted: &[(&str, Counted)]) {
    let bare = counted.first().map_or(0.0, |(_, counted)| counted.per_request);
    let added = |name: &str| {
        let found = counted.iter().find(|(other, _)| *other == name);
        found.map_or(f64::NAN, |(_, counted)| counted.per_request - bare)
    };
    println!("\n  instructions in Envoy, a request     all    more than bare");
    for (name, counted) in counted {
        println!("  {name:<30} {:9.0} {:13.0}", counted.per_request, counted.per_request - bare);
    }
    println!(
        "\n  a known key, beside jwt_authn with HS256    {:.2}",
        added("keygate_known") / added("jwt_authn_hs256")
    );
    println!(
        "  a known key, beside jwt_authn's full cache  {:.2}",
        added("keygate_known") / added("jwt_authn_cached")
    );
    println!(
        "  a new key, beside jwt_authn with ES256      {:.2}",
        added("keygate_new") / added("jwt_authn_es256")
    );
    if let Some((_, known)) = counted.iter().find(|(name, _)| *name == "keygate_known") {
        println!("\n  of a known key, what WebAssembly calls in Envoy");
        for (name, count) in &known.crossings {
            println!("  {name:<44} {count:8.0}");
        }
    }
}

fn figures(counted: &[(&str, Counted)], requests: usize) -> Value {
    let variants: serde_json::Map<String, Value> = counted
        .iter()
        .map(|(name, counted)| {
            let crossings: serde_json::Map<String, Value> =
                counted.crossings.iter().map(|(name, count)| (name.clone(), json!(count.round()))).collect();
            (
                (*name).to_owned(),
                json!({ "instructions_per_request": counted.per_request.round(), "crossings": crossings }),
            )
        })
        .collect();
    json!({ "requests": requests, "variants": variants })
}

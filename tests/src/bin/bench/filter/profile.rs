//! How many instructions a request takes in Envoy, and where: callgrind counts those of the whole process, WebAssembly's
//! included, so that it does not matter what else the machine does. The kernel's are not among them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use keygate_e2e::binaries;
use keygate_e2e::durability::Dice;
use keygate_e2e::wait::pass;
use serde_json::{Value, json};

use super::bed::{Bed, Under};
use super::client::{Client, Shot};
use super::cost::CONNECTIONS;
use super::cpu::{self, Cpus};
use super::tokens::Tokens;
use super::variant::{ALL, Load, Variant};
use super::{SEED, number};

/// A variant. Fifty times as slow as without callgrind.
const REQUESTS: usize = 1_024;
/// Before that, not counted: until connections, remembered keys and records of limits are as they stay. V8 optimises all
/// that it compiles in Envoy at once: ten times as many make no difference.
const WARM_UP: usize = 6_000;
/// For how long it is watched while there are no requests.
const IDLE: std::time::Duration = std::time::Duration::from_secs(5);
/// So many keys come again and again: with more, a request would pay for the slowness of all, since each came seldom.
const KEYS: usize = 32;

pub fn run() {
    let [requests, seed] = [("KEYGATE_REQUESTS", REQUESTS), ("KEYGATE_SEED", SEED)]
        .map(|(name, usual)| number(name).unwrap_or(usual));
    let mut dice = Dice::new(seed as u64);
    let cpus = Cpus::find();
    println!("setting up");
    let (bed, prepared) = Bed::start(cpus, &mut dice, Under::Callgrind);
    let mut tokens =
        Tokens::new(&bed.api(), dice.split(), prepared.owners, &prepared.signer, &prepared.eddsa);
    let of_new = ALL.iter().filter(|variant| !variant.aside && matches!(variant.load, Load::New(_))).count();
    tokens.have_new(&bed.api(), of_new * (requests + WARM_UP));
    cpu::pin_this_thread(cpus.rest);
    cpu::prefer(None);
    let kept = binaries::root().join("target/bench/profile");
    fs::create_dir_all(&kept).expect("a directory for dumps");
    let callgrind = Callgrind { process: bed.envoy_id(), directory: bed.directory().to_owned(), kept };

    let only = std::env::var("KEYGATE_VARIANTS").ok();
    let is_asked_for =
        |name: &str| only.as_ref().is_none_or(|names| names.split(',').any(|other| other == name));
    let wanted = |variant: &&Variant| {
        (!variant.aside || variant.load == Load::Unlimited)
            && variant.name != "ext_authz"
            && is_asked_for(variant.name)
    };
    let mut counted: Vec<Counted> = Vec::new();
    for variant in ALL.iter().filter(wanted) {
        let of_it = of(&bed, &tokens, &callgrind, variant, requests);
        println!("  {:<18} {:8.0} instructions", of_it.name, of_it.instructions);
        counted.push(of_it);
    }
    bed.assert_no_vm_died();
    print(&counted);
    crate::write("profile", &figures(&counted, requests));
}

/// What a request took.
struct Counted {
    name: &'static str,
    instructions: f64,
    /// Calls from WebAssembly into Envoy, and the instructions of all of them.
    calls: (f64, f64),
}

fn of(bed: &Bed, tokens: &Tokens, callgrind: &Callgrind, variant: &Variant, requests: usize) -> Counted {
    let mut client = Client::connect(bed.port(variant.listener), CONNECTIONS);
    let draw = |count: usize| match variant.load {
        Load::Known => repeat(tokens.every_known(), count),
        Load::Unlimited => repeat(tokens.every_unlimited(), count),
        load => tokens.draw(load, count),
    };
    client.closed(draw(WARM_UP).into_iter()).expect_right(variant.name);
    callgrind.watch();
    pass(IDLE);
    let idle = Counts::of(&callgrind.dump("idle"));
    let shots = draw(requests);
    let sent = shots.len();
    let begun = Instant::now();
    callgrind.zero();
    client.closed(shots.into_iter()).expect_right(variant.name);
    let took = begun.elapsed().as_secs_f64();
    let all = Counts::of(&callgrind.dump(variant.name));
    callgrind.look_away();
    // What is done without requests, too, is not of them.
    let each = |of: fn(&Counts) -> f64| (of(&all) - of(&idle) * took / IDLE.as_secs_f64()) / sent as f64;
    Counted {
        name: variant.name,
        instructions: each(|counts| counts.instructions),
        calls: (each(|counts| counts.calls), each(|counts| counts.in_calls)),
    }
}

fn repeat<'a>(shots: impl Iterator<Item = Shot<'a>>, count: usize) -> Vec<Shot<'a>> {
    shots.take(KEYS).collect::<Vec<_>>().repeat(count.div_ceil(KEYS))
}

/// What stands in a dump.
struct Counts {
    instructions: f64,
    calls: f64,
    in_calls: f64,
}

impl Counts {
    fn of(file: &Path) -> Self {
        let dump = fs::read_to_string(file).expect("a dump");
        let (calls, in_calls) = calls_into_envoy(&dump);
        Self { instructions: total(&dump), calls, in_calls }
    }
}

/// The valgrind that Envoy runs under.
struct Callgrind {
    process: u32,
    directory: PathBuf,
    /// Where dumps are kept, for whoever wants to look further.
    kept: PathBuf,
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
        self.control(&["--dump"]);
        let prefix = format!("{}.", Under::OUT);
        let mut files = fs::read_dir(&self.directory).expect("the directory").flatten();
        // The one before was taken away.
        let dumped = files.find(|file| file.file_name().to_string_lossy().starts_with(&prefix));
        let dumped = dumped.expect("callgrind dumps").path();
        let kept = self.kept.join(format!("{name}.callgrind"));
        fs::copy(&dumped, &kept).expect("a dump");
        fs::remove_file(&dumped).expect("a dump");
        kept
    }
}

/// The sum of a dump.
fn total(dump: &str) -> f64 {
    let of =
        |line: &str| line.strip_prefix("totals: ").or(line.strip_prefix("summary: "))?.trim().parse().ok();
    dump.lines().rev().find_map(of).expect("a dump has its sum")
}

/// How often code that is in no file, as what V8 compiles, called the one function of Envoy in which most was done for
/// it, and how many instructions that took with all that it called. V8 has one for all calls of WebAssembly. Envoy is
/// stripped, so its functions have no names.
///
/// See "Callgrind Format Specification" in valgrind's manual: names and objects stand with a number where they come
/// first, and are a number after that.
fn calls_into_envoy(dump: &str) -> (f64, f64) {
    let mut objects = HashMap::new();
    let mut functions = HashMap::new();
    let (mut object, mut called_object, mut called) = (String::new(), None, String::new());
    let mut calls = None;
    let mut found: HashMap<String, (f64, f64)> = HashMap::new();
    for line in dump.lines() {
        if let Some(name) = line.strip_prefix("ob=") {
            object = named(&mut objects, name);
        } else if let Some(name) = line.strip_prefix("cob=") {
            called_object = Some(named(&mut objects, name));
        } else if let Some(name) = line.strip_prefix("fn=") {
            named(&mut functions, name);
            called_object = None;
        } else if let Some(name) = line.strip_prefix("cfn=") {
            called = named(&mut functions, name);
        } else if let Some(rest) = line.strip_prefix("calls=") {
            calls = rest.split(' ').next().and_then(|count| count.parse::<f64>().ok());
        } else if let Some(count) = calls.take() {
            // The line after `calls=` has what they took.
            let taken =
                line.split(' ').next_back().and_then(|taken| taken.parse::<f64>().ok()).unwrap_or(0.0);
            if object == NO_FILE && called_object.as_ref().is_some_and(|object| object.ends_with("envoy")) {
                let of = found.entry(called.clone()).or_default();
                *of = (of.0 + count, of.1 + taken);
            }
            called_object = None;
        }
    }
    found.into_values().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default()
}

/// What callgrind calls the file of code that is in none.
const NO_FILE: &str = "???";

/// `(7) name` the first time, `(7)` after that.
fn named(known: &mut HashMap<String, String>, text: &str) -> String {
    let (number, name) = text.split_once(' ').unwrap_or((text, ""));
    if name.is_empty() {
        return known.get(number).cloned().unwrap_or_default();
    }
    known.insert(number.to_owned(), name.to_owned());
    name.to_owned()
}

fn print(counted: &[Counted]) {
    let bare = counted.first().map_or(0.0, |bare| bare.instructions);
    println!("\nInstructions a request in Envoy, of which in calls from WebAssembly\n");
    println!("  {:<20} {:>9} {:>15} {:>9} {:>9}", "", "all", "more than bare", "calls", "in them");
    for Counted { name, instructions, calls: (calls, taken) } in counted {
        println!("  {name:<20} {instructions:9.0} {:15.0} {calls:9.1} {taken:9.0}", instructions - bare);
    }
    println!(
        "\nTime passes slowly: each request looks for news, which one in many does else. Envoy's own cryptography"
    );
    println!("may take other instructions than the CPU has. The dumps are in target/bench/profile.");
}

fn figures(counted: &[Counted], requests: usize) -> Value {
    let of = |counted: &Counted| {
        let (calls, taken) = counted.calls;
        let figures = json!({
            "instructions_per_request": counted.instructions.round(),
            "calls_into_envoy": (calls * 10.0).round() / 10.0,
            "instructions_in_calls": taken.round(),
        });
        (counted.name.to_owned(), figures)
    };
    let variants: serde_json::Map<String, Value> = counted.iter().map(of).collect();
    json!({ "requests": requests, "variants": variants })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_from_code_in_no_file_are_found_in_a_dump() {
        let dump = "ob=(1) /usr/bin/envoy\nfn=(1) a\n10 5\nob=(2) ???\nfn=(2) jit\n10 7\ncob=(1)\ncfn=(1)\ncalls=3 0\n10 300\n\
                    cob=(1)\ncfn=(3) other\ncalls=9 0\n11 90\nfn=(4) jit too\ncob=(1)\ncfn=(1)\ncalls=2 0\n12 50\n";
        assert_eq!(calls_into_envoy(dump), (5.0, 350.0));
    }
}
